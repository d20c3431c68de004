"""Lists and runs beside each other in a real browser: ticking that outlives a refresh, and light, dark and 320 px."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from app import naming
from app.evaluation import comparisons
from app.jobs import service as jobs
from app.kit import ids
from tests.looks import look_at
from tests.routes.test_comparisons import body, chats, create, end, kinds

__all__ = ["chats", "kinds"]
pytestmark = pytest.mark.browser


LONG = "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft" * 2


@pytest.mark.long
def test_a_name_without_a_space_pushes_no_column_out_of_sight(page: Page, served: str, session, user, chats, tmp_path: Path):
    chats.name = LONG
    session.commit()
    page.set_viewport_size({"width": 1360, "height": 900})
    for path in ("datasets", "datasets/combine"):
        page.goto(f"{served}/{path}")
        assert page.locator("main .scroll").evaluate_all("all => all.map((one) => one.scrollWidth - one.clientWidth)") == [0], path
        look_at(page, f"long-name-{path.replace('/', '-')}", tmp_path)


@pytest.mark.long
def test_runs_are_ticked_compared_and_deleted(page: Page, served: str, session, user, tiny_registered, chats, tmp_path: Path):
    names = ["lora", {"name": "lora", "rank": 2}, "ia3", "full", "top_layers", "layer_norm", "bottleneck_adapter", "prefix_tuning"]
    found = create(session, user, body(chats, *names))
    every = comparisons.jobs_of(session, found)
    for n, job in enumerate(every[:-1]):
        kept = "nothing, by construction" if n else "within noise"  # the longest note of a table
        end(session, job, loss=1.2 + n / 9, memory=int(1e9 * (n + 1)), seconds=40 + n, noise=0.02, verdict=kept)
        naming.tag(session, job, ["nightly", "support"][: n % 3])
    session.commit()
    page.set_viewport_size({"width": 1360, "height": 900})
    page.goto(f"{served}/jobs")
    page.get_by_label("Select all").check()
    box = page.locator("input[name=pick]")
    assert box.evaluate_all("all => all.every((one) => one.checked)")
    box.first.uncheck()
    with page.expect_response(lambda answer: answer.url.endswith("/jobs") and "hx-request" in answer.request.headers, timeout=9000):
        pass  # the list is laid over, since a run of it is queued
    page.wait_for_timeout(200)
    assert [one.is_checked() for one in box.all()] == [False] + [True] * 7, "what was ticked stays so"
    assert page.get_by_label("Select all").evaluate("all => all.indeterminate")
    box.first.check()
    look_at(page, "list-jobs", tmp_path)
    page.get_by_role("button", name="Compare").click()
    page.wait_for_url("**/jobs/compare?*")
    expect(page.locator(".plot canvas")).to_have_count(2)
    look_at(page, "compare-runs", tmp_path)
    for path in (f"{served}/compare/{ids.public(ids.COMPARISON, found.id)}", page.url):
        page.goto(path)
        cut = "all => all.filter((one) => one.checkVisibility() && one.scrollWidth > one.clientWidth + 1).map((one) => `${one.ariaLabel} ${one.scrollWidth} ${one.clientWidth}`)"
        for width in (1360, 900):
            page.set_viewport_size({"width": width, "height": 900})
            assert page.locator("main .scroll").evaluate_all(cut) == [], (path, width)
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto(f"{served}/compare/{ids.public(ids.COMPARISON, found.id)}")
    assert page.locator("main .scroll:has(table)").evaluate_all(cut) == []
    for name in ("models", "datasets", "compare"):
        page.goto(f"{served}/{name}")
        look_at(page, f"list-{name}", tmp_path)
    page.goto(f"{served}/jobs?status=succeeded")
    box.first.check()
    page.once("dialog", lambda asked: asked.accept())
    page.get_by_role("button", name="Delete").click()
    expect(page.locator(".message")).to_contain_text("1 run deleted.")
    assert len(jobs.list_(session, user)) == 7 and "status=succeeded" in page.url
