"""The screenshots of docs/demo.md, taken from a demo that is running.

    python apps/demo.py &
    python apps/demo_screenshots.py http://127.0.0.1:7860 docs/images

Needs playwright and Debian's chromium (or any Chromium on the PATH by that name).
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, sync_playwright

WIDE = {"viewport": {"width": 1280, "height": 860}}
PHONE = {
    "viewport": {"width": 390, "height": 780}, "device_scale_factor": 2, "is_mobile": True,
    "has_touch": True,
}  # fmt: skip


def draw(page: Page, seed: int, button: str = "#generate") -> None:
    """Draw eight pictures with a fixed seed, the settings folded away again."""
    page.click("#advanced > button")
    page.fill("#seed input, #seed textarea", str(seed))
    page.click("#advanced > button")
    page.click(button)
    page.wait_for_selector("#gallery [data-pick='7']")
    page.wait_for_function("!document.querySelector('.status.busy')")


def save(page: Page, path: Path, full: bool = False) -> None:
    """A screenshot of what is in view, or of the whole page."""
    page.wait_for_timeout(600)
    shot = Image.open(io.BytesIO(page.screenshot(full_page=full))).convert("RGB")
    shot.save(path, optimize=True)
    print(path)


def main(url: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )

        def visit(**window: Any) -> Page:
            page = browser.new_context(**window).new_page()
            page.set_default_timeout(180_000)
            page.goto(url)
            page.wait_for_selector("#generate")
            return page

        page = visit(**WIDE)
        draw(page, 22)
        page.click("#gallery [data-pick='1']")
        page.wait_for_selector("#maps .map")
        save(page, folder / "demo-desktop.png", full=True)

        page = visit(**WIDE, color_scheme="dark")
        draw(page, 4, "#surprise")
        page.click("#vary")
        page.wait_for_function("document.querySelectorAll('#gallery .strip .save').length == 16")
        save(page, folder / "demo-dark.png")

        page = visit(**PHONE)
        draw(page, 22)
        page.evaluate("window.scrollTo(0, 0)")
        save(page, folder / "demo-phone.png")
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1].rstrip("/"), Path(sys.argv[2]))
