"""A picture of the page, after a question: python tests/serve/screenshot.py ADDRESS QUESTION FILE.png [dark]

ADDRESS is that of a server at work. lessons/pictures/serve.png was taken from `minilora serve --demo --no-open`.
Needs what test_page.py needs.
"""

import os
import shutil
import sys

from playwright.sync_api import sync_playwright


def take(address, question, file, scheme="light"):
    """Ask base, adapters and a mix of the first two, and take the whole page when all have answered."""
    with sync_playwright() as driver:
        path = os.environ.get("CHROMIUM") or shutil.which("chromium") or driver.chromium.executable_path
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme=scheme)
        page.goto(address)
        page.get_by_role("checkbox").first.wait_for()
        if page.get_by_role("switch").is_visible():
            page.get_by_role("switch").check()
        page.get_by_label("Question", exact=True).fill(question)
        page.keyboard.press("Enter")
        page.wait_for_function(
            "() => document.querySelector('article') && !document.querySelector('.writes')", timeout=300_000
        )
        page.screenshot(path=file, full_page=True)
        browser.close()


if __name__ == "__main__":
    take(*sys.argv[1:])
