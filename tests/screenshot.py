"""A picture of the page, after a question: python tests/screenshot.py ADDRESS QUESTION FILE.png [dark]
Of the page of `minilora site`, after teaching: python tests/screenshot.py ADDRESS "" FILE.png [dark]

ADDRESS is that of a server at work. lessons/pictures/serve.png was taken from adapters for
support-labels, support-fields and, with --config facts, support. Needs what
tests/serve/test_page.py needs.
"""

import sys

from browsers import chromium


def take(address, question, file, scheme="light"):
    """Ask base, adapters and a mix of the first two, and take the whole page when all have answered."""
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme=scheme)
        page.goto(address)
        page.get_by_role("checkbox").first.wait_for()
        if page.get_by_role("switch").is_visible():
            page.get_by_role("switch").check()
        for box in page.get_by_role("checkbox").all():
            box.check()
        page.get_by_label("Question", exact=True).fill(question)
        page.keyboard.press("Enter")
        page.wait_for_function(
            "() => document.querySelector('article') && !document.querySelector('.writes')", timeout=300_000
        )
        page.screenshot(path=file, full_page=True)


def take_site(address, file, scheme="light"):
    """Teach the ten facts, and take the upper part of the page."""
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1080, "height": 760}, color_scheme=scheme)
        page.goto(address)
        page.get_by_role("button", name="Teach").and_(page.locator(":enabled")).click(timeout=300_000)
        page.locator("#status", has_text="Taught after").wait_for(timeout=300_000)
        page.screenshot(path=file)


if __name__ == "__main__":
    address, question, *rest = sys.argv[1:]
    take(address, question, *rest) if question else take_site(address, *rest)
