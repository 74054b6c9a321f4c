"""Make the screenshots of docs/demo.md from a running demo, on an idle machine.

    moveimg demo --port 7860 &
    python tools/screenshots.py http://127.0.0.1:7860 docs/images

Needs playwright and Debian's chromium.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

WIDE = {"viewport": {"width": 1280, "height": 860}}
PHONE = {"viewport": {"width": 390, "height": 780}, "device_scale_factor": 2, "is_mobile": True}


def draw(browser: Browser, url: str, seed: int, button: str, **window: Any) -> Page:
    """Open the page and draw eight images with a fixed seed."""
    page = browser.new_context(**window).new_page()
    page.set_default_timeout(180_000)
    page.goto(url)
    page.click("#advanced > button")
    page.fill("#seed input, #seed textarea", str(seed))
    page.click("#advanced > button")
    page.click(button)
    page.wait_for_selector("#gallery [data-pick='7']")
    return page


def save(page: Page, path: Path, full: bool = False) -> None:
    """Save what is in view, or the whole page."""
    page.wait_for_timeout(1000)
    image = Image.open(io.BytesIO(page.screenshot(full_page=full))).convert("RGB")
    image.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    print(path)


def main(url: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu"]
        )
        page = draw(browser, url, 22, "#generate", **WIDE)
        page.click("#gallery [data-pick='1']")
        page.wait_for_selector("#maps .map")
        save(page, folder / "demo-desktop.png", full=True)
        page = draw(browser, url, 4, "#surprise", **WIDE, color_scheme="dark")
        page.click("#vary")
        page.wait_for_function("document.querySelectorAll('#gallery .strip .save').length == 16")
        save(page, folder / "demo-dark.png")
        page = draw(browser, url, 3, "#generate", **WIDE)  # the first class
        page.get_by_role("tab", name="Edit").click()
        page.click("#painter .drawn button >> nth=0")
        page.click("#painter [data-keep=top]")
        page.click("#edit-advanced > button")
        page.fill("#edit-seed input, #edit-seed textarea", "1")
        page.click("#edit")
        page.wait_for_function("document.querySelectorAll('#versions .save').length == 4")
        page.click("#edit-advanced > button")
        save(page, folder / "demo-edit.png", full=True)
        page = draw(browser, url, 22, "#surprise", **PHONE, has_touch=True)
        page.evaluate("window.scrollTo(0, 0)")
        save(page, folder / "demo-phone.png")
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1].rstrip("/"), Path(sys.argv[2]))
