"""Make the screenshots of docs/demo.md from a running demo, on an idle machine.

    python tools/screenshots.py http://127.0.0.1:7860 docs/images

Needs playwright and Debian's chromium.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

PHONE = {"viewport": {"width": 390, "height": 780}, "device_scale_factor": 2, "is_mobile": True}


def draw(browser: Browser, url: str, seed: int, **window) -> Page:
    """Open the page and draw eight images with a fixed seed."""
    page = browser.new_context(**window).new_page()
    page.set_default_timeout(180_000)
    page.goto(url)
    page.click("#advanced > button")
    page.fill("#seed input", str(seed))
    page.click("#advanced > button")
    page.click("#generate")
    page.wait_for_selector("#gallery .save >> nth=7")
    return page


def save(page: Page, path: Path) -> None:
    """Save the whole page."""
    page.wait_for_timeout(1000)
    image = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    image.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


with sync_playwright() as playwright:
    url, folder = sys.argv[1], Path(sys.argv[2])
    chromium = playwright.chromium.launch(executable_path="/usr/bin/chromium")
    save(draw(chromium, url, 22), folder / "demo-desktop.png")
    save(draw(chromium, url, 22, **PHONE), folder / "demo-phone.png")
    page = draw(chromium, url, 4, color_scheme="dark")
    page.click("#bank-off")
    page.wait_for_selector("#gallery .strip .save >> nth=7")
    save(page, folder / "demo-dark.png")
    page.get_by_role("tab", name="Edit").click()
    page.click("#painter .drawn button >> nth=0")
    page.click("#painter [data-keep=top]")
    page.fill("#edit-seed input", "1")
    page.click("#edit")
    page.wait_for_selector("#versions .save >> nth=3")
    save(page, folder / "demo-edit.png")
