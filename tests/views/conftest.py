"""A page of the studio in a real browser, signed in."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Page

from app.web import auth


@pytest.fixture
def page(browser_page: Page, served: str, session, user) -> Iterator[Page]:
    """Signed in. What the content security policy had to stop fails the test."""
    stopped: list[str] = []
    browser_page.on("console", lambda said: stopped.append(said.text) if said.type == "error" else None)
    link = auth.new_sign_in_link(session, user)
    session.commit()
    browser_page.goto(served + link)
    yield browser_page
    assert not [text for text in stopped if "Content Security Policy" in text or "integrity" in text], stopped
