"""The picture of a report in README and documentation: ``python docs/screenshot.py out/demo/report.html``."""

import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

TARGET = Path(__file__).parent / "assets" / "report.png"


def main() -> None:
    report = Path(sys.argv[1]).resolve()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 1000}, device_scale_factor=1.5)
        page.goto(report.as_uri())
        page.wait_for_selector("html[data-drawn]")
        box = page.locator("#reliability").bounding_box()
        clip = {"x": 0, "y": 0, "width": 1280, "height": box["y"] + box["height"] + 30}
        page.screenshot(path=TARGET, clip=clip, full_page=True)
        browser.close()
    Image.open(TARGET).convert("RGB").quantize(256).save(TARGET, optimize=True)


if __name__ == "__main__":
    main()
