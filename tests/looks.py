"""What browser tests of pages share: signing in, and looking at a page in light, dark and 320 px."""

from __future__ import annotations

import os
from pathlib import Path


def sign_in(page, url: str, session, user):
    from app.web import auth

    link = auth.new_sign_in_link(session, user)
    session.commit()
    page.goto(url + link)
    if page.locator("form button").count() and "/sign-in" in page.url:
        page.locator("main form button").first.click()
    return page


UNSETTLED = "script[src*='js/refresh.js'], #reading"
"""What a page has that is about to load itself again, because its answer is not there yet."""
COLORS = ("color-contrast", "link-in-text-block")
"""The rules of axe that can find in one theme what they did not find in the other: all others read the document and its boxes."""


def objections(page, rules: tuple[str, ...] = ()) -> list[str]:
    """What axe objects to on the page as it is now, by all its rules or by these."""
    from axe_playwright_python.base import AXE_SCRIPT

    if not page.evaluate("'axe' in window"):
        page.evaluate(AXE_SCRIPT)
    options = {"resultTypes": ["violations"]} | ({"runOnly": {"type": "rule", "values": rules}} if rules else {})
    found = page.evaluate("async (options) => (await axe.run(options)).violations", options)
    return [f"{one['id']}: {one['help']}: {node['html'][:200]} {node['failureSummary']}" for one in found for node in one["nodes"]]


def check(page, folder: Path, name: str, rules: tuple[str, ...] = ()) -> None:
    """Fits its width, and says nothing axe objects to by all its rules or by these. Pictures: of every page in the folder that
    PICTURES names, or of one at fault in `folder`."""
    page.locator(UNSETTLED).first.wait_for(state="detached", timeout=60_000)
    wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    faults = [*([f"{wide} px wider than the window"] if wide > 0 else []), *objections(page, rules)]
    wanted = os.environ.get("PICTURES")
    if wanted or faults:
        page.screenshot(path=Path(wanted or folder) / f"{name}.png", full_page=True)
    assert not faults, f"{name}: {faults}"


def look_at(page, name: str, folder: Path) -> None:
    """Checked in light and dark, 1280 and 320 px wide."""
    page.locator(UNSETTLED).first.wait_for(state="detached", timeout=60_000)
    for width in (1280, 320):
        page.set_viewport_size({"width": width, "height": 900})
        for theme in ("light", "dark"):
            page.evaluate("theme => document.documentElement.dataset.theme = theme", theme)
            check(page, folder, f"{name}-{theme}-{width}", COLORS if theme == "dark" else ())
    page.set_viewport_size({"width": 1280, "height": 900})
