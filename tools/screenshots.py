"""Make the screenshots of docs/demo.md from a running demo, on an idle machine.

    python tools/screenshots.py http://127.0.0.1:7860 docs/images

Needs playwright and Debian's chromium.
"""

import io
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

PHONE = {"viewport": {"width": 390, "height": 780}, "device_scale_factor": 2, "is_mobile": True}


def save(page: Page, name: str) -> None:
    """Save a screenshot of the whole page, with 256 colours."""
    page.wait_for_timeout(1000)
    image = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    image.quantize(256, dither=Image.Dither.NONE).save(Path(sys.argv[2], name), optimize=True)


with sync_playwright() as playwright:
    chromium = playwright.chromium.launch(executable_path="/usr/bin/chromium")
    windows: dict = {"desktop": {}, "phone": PHONE, "dark": {"color_scheme": "dark"}}
    for kind, window in windows.items():
        page = chromium.new_context(**window).new_page()
        page.set_default_timeout(180_000)
        page.goto(sys.argv[1])
        page.click("#advanced > button")
        page.fill("#seed input", "4" if kind == "dark" else "22")
        page.click("#advanced > button")
        page.click("#generate")
        page.wait_for_selector("#gallery .save >> nth=7")
        if kind == "dark":
            page.click("#bank-off")
            page.wait_for_selector("#gallery .strip .save >> nth=7")
        save(page, f"demo-{kind}.png")
    page.get_by_role("tab", name="Edit").click()
    page.click("#painter .drawn button >> nth=0")
    page.click("#painter [data-keep=top]")
    page.fill("#edit-seed input", "1")
    page.click("#edit")
    page.wait_for_selector("#versions .save >> nth=3")
    save(page, "demo-edit.png")
