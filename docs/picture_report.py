"""Take the pictures of an evaluation's page that README.md shows, with the Chromium of this machine.

python docs/picture_report.py runs/demo/evaluation-merged/report.html
"""

import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

PICTURES = Path(__file__).parent / "pictures"
SIZE = {"width": 1100, "height": 960}


def main(page_file: str) -> None:
    """Open the page in light and dark, and its first clip, and take pictures of both."""
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for look in ("light", "dark"):
            page = browser.new_page(viewport=SIZE, color_scheme=look)
            page.goto(Path(page_file).absolute().as_uri())
            page.locator("#clip-table .row-button").first.click()
            page.locator("#clips").scroll_into_view_if_needed()
            page.evaluate("document.getElementById('clips').scrollIntoView()")
            picture = PICTURES / f"report-{look}.png"
            page.screenshot(path=picture)
            Image.open(picture).convert("RGB").quantize(128).save(picture, optimize=True)
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1])
