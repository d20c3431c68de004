"""Searches and matrices in a real browser: what can be clicked, and light, dark and 320 px."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import Page, expect
from sqlalchemy import select

from app.evaluation import comparisons
from app.kit import ids
from app.searches import service as searches
from app.tables import Job
from tests.evaluation.test_matrix import order
from tests.looks import look_at
from tests.routes.test_comparisons import chats, create, end, kinds
from tests.routes.test_model_comparisons import two
from tests.searches.test_searches import play, train

__all__ = ["chats", "kinds", "two"]
pytestmark = pytest.mark.browser


@pytest.mark.long
def test_a_search_is_ordered_and_followed_to_its_winner(page: Page, served: str, session, user, tiny_registered, chats, tmp_path: Path):
    page.goto(f"{served}/searches/new")
    expect(page.locator("#before")).to_contain_text("Total time")
    page.get_by_label("Trials", exact=True).fill("4")
    page.get_by_label("Epochs", exact=True).fill("3")
    page.get_by_label("Rank", exact=True).fill("4, x")
    expect(page.locator("#before")).to_contain_text("4, x is no list of numbers")
    look_at(page, "search-new-wrong", tmp_path)
    page.get_by_label("Rank", exact=True).fill("4, 8")
    expect(page.locator("#start")).to_be_enabled()
    look_at(page, "search-new", tmp_path)
    page.locator("#start").click()
    page.wait_for_url("**/searches/search-*")
    look_at(page, "search-waiting", tmp_path)
    search = searches.newest(session, user, 1)[0]
    train(session, session.scalars(select(Job).where(Job.comparison_id == search.id)).one())
    expect(page.locator("#search")).to_contain_text("1 of 4 a ninth of the steps", timeout=15_000)  # without a reload
    play(session, search)
    expect(page.locator("#search .pill").first).to_have_text("Succeeded", timeout=15_000)
    expect(page.locator("#search")).to_contain_text("is the winner")
    look_at(page, "search-ended", tmp_path)
    page.get_by_role("link", name="New run with these settings").click()
    expect(page.locator("#form")).to_be_visible()
    page.goto(f"{served}/searches")
    look_at(page, "searches", tmp_path)


@pytest.mark.long
def test_a_matrix_and_a_size_curve(page: Page, served: str, session, user, two, chats, kinds, tmp_path: Path):
    page.goto(f"{served}/compare/new?kind=matrix")
    page.locator("input[name=on]").nth(1).uncheck()
    expect(page.locator("#start")).to_be_disabled()
    page.locator("input[name=on]").nth(1).check()
    expect(page.locator("#start")).to_be_enabled()
    look_at(page, "matrix-new", tmp_path)
    found = create(session, user, order(chats, kinds, from_nothing=True))
    for place, job in enumerate(comparisons.jobs_of(session, found)):
        scores = {"bits_per_byte": 1 + place / 9} if job.dataset_id == chats.id else {"accuracy": 0.9 - place / 20, "macro_f1": 0.8}
        end(session, job, loss=1.0 + place / 9, memory=10**8 * (place + 1), seconds=20.0 * (place + 1), **scores)
    page.goto(f"{served}/compare/{ids.public(ids.COMPARISON, found.id)}")
    assert page.locator("svg.picture").count() == 4, "a score for each dataset, memory and time"
    look_at(page, "matrix", tmp_path)
