"""What browser tests of pages share: signing in, and looking at a page in light, dark and 320 px."""

from __future__ import annotations

import os
from pathlib import Path


def sign_in(page, url: str, session, user):
    from app import accounts

    link = accounts.new_sign_in_link(session, user)
    session.commit()
    page.goto(url + link)
    if page.locator("form button").count() and "/sign-in" in page.url:
        page.locator("main form button").first.click()
    return page


def look_at(page, name: str, folder: Path) -> None:
    """No page is wider than its window, axe objects to nothing, and pictures are left to look at."""
    from axe_playwright_python.sync_playwright import Axe

    folder = Path(os.environ.get("PICTURES") or folder)
    folder.mkdir(parents=True, exist_ok=True)
    for theme in ("light", "dark"):
        page.evaluate("theme => document.documentElement.dataset.theme = theme", theme)
        for width in (1280, 320):
            page.set_viewport_size({"width": width, "height": 900})
            page.screenshot(path=folder / f"{name}-{theme}-{width}.png", full_page=True)
            wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert wide <= 0, f"{name} is {wide} px wider than a window of {width}"
            found = Axe().run(page)
            assert found.violations_count == 0, f"{name}, {theme}, {width}: {found.generate_report()}"
    page.set_viewport_size({"width": 1280, "height": 900})
