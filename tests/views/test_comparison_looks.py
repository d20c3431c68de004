"""Comparisons, learning curves and results of jobs in a real browser: what can be clicked, and light, dark and 320 px."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from app.evaluation import comparisons
from app.jobs import service as jobs
from app.kit import ids
from tests.looks import look_at
from tests.routes.test_comparisons import body, chats, create, end, kinds
from tests.routes.test_job_results import GENERATION, classified, finish, forgotten

__all__ = ["chats", "kinds"]
pytestmark = pytest.mark.browser


def address(comparison) -> str:
    return f"/compare/{ids.public(ids.COMPARISON, comparison.id)}"


@pytest.mark.long
def test_a_comparison_is_chosen_ordered_and_followed(page: Page, served: str, session, user, tiny_registered, chats, tmp_path: Path):
    page.goto(f"{served}/compare/new")
    start = page.locator("#start")
    first = int(re.search(r"\d+", start.inner_text()).group(0))
    page.locator('input[name=strategy][value="full"]').uncheck()
    expect(start).to_have_text(f"Start {first - 1} runs")
    before = page.locator("#before").inner_text()
    page.get_by_label("Epochs").fill("9")
    page.get_by_label("Epochs").blur()
    expect(page.locator("#before")).not_to_have_text(before, use_inner_text=True)
    assert not page.locator('input[name=strategy][value="full"]').is_checked(), "what was unchecked stays unchecked"
    look_at(page, "comparison-new", tmp_path)
    while page.locator("input[name=strategy]:checked").count():
        page.locator("input[name=strategy]:checked").first.uncheck()
    expect(page.locator("#before")).to_contain_text("Choose at least two methods")
    expect(start).to_be_disabled()
    for name in ("lora", "ia3"):
        page.locator(f'input[name=strategy][value="{name}"]').check()
    expect(start).to_have_text("Start 2 runs")
    start.click()
    page.wait_for_url("**/compare/cmp-*")
    look_at(page, "comparison-waiting", tmp_path)
    expect(page.locator("#comparison")).to_contain_text("0 of 2 runs")
    for job, loss in zip(jobs.list_(session, user), (1.2, 1.4), strict=True):
        end(session, job, loss=loss, memory=int(1e9 * loss), seconds=40 * loss)
    expect(page.locator("svg.picture")).to_be_visible(timeout=15_000)  # without a reload
    expect(page.locator("#comparison .pill").first).to_have_text("Succeeded")
    page.get_by_label("X axis").select_option("peak_memory_bytes")
    page.get_by_role("button", name="Draw").click()
    expect(page.get_by_role("heading", name="Validation loss against peak memory")).to_be_visible()
    page.goto(f"{served}/compare")
    look_at(page, "comparisons", tmp_path)


@pytest.mark.long
def test_a_comparison_of_many_at_its_end(page: Page, served: str, session, user, tiny_registered, chats, tmp_path: Path):
    names = [
        "lora",
        "dora",
        {"name": "lora", "rank": 2},
        "ia3",
        "full",
        "top_layers",
        "layer_norm",
        "bottleneck_adapter",
        "prefix_tuning",
        "bitfit",
    ]
    found = create(session, user, body(chats, *names))
    for n, job in enumerate(comparisons.jobs_of(session, found)):
        verdict = ["within noise", "gained", "forgot a little", "forgot much"][n % 4]
        memory = job.estimate["memory_bytes"] * (0.95 + n / 50)
        end(session, job, loss=1.1 + (n * 7 % 5) / 20, memory=int(memory), seconds=30 + 12 * n, change=(n % 4 - 1) * 0.03, verdict=verdict)
    page.goto(served + address(found))
    look_at(page, "comparison", tmp_path)
    page.set_viewport_size({"width": 320, "height": 900})
    assert all(cell.bounding_box()["x"] < 320 for cell in page.locator(".compared tbody tr").first.locator("td").all()), (
        "each is on the page"
    )
    page.set_viewport_size({"width": 1280, "height": 900})
    assert page.locator(".winner").count() == 2 and page.locator(".dot-of").count() == 9
    page.locator(".compared tbody a").first.click()
    expect(page.get_by_text("Part of the comparison")).to_be_visible()


@pytest.mark.long
def test_a_learning_curve(page: Page, served: str, session, user, tiny_registered, kinds, tmp_path: Path):
    page.goto(f"{served}/compare/new?kind=learning_curve")
    page.locator('input[name=strategy][value="dense_head"]').check()
    expect(page.locator("#start")).to_have_text("Start 3 runs")
    look_at(page, "learning-curve-new", tmp_path)
    page.locator("#start").click()
    page.wait_for_url("**/compare/cmp-*")
    for job, share in zip(sorted(jobs.list_(session, user), key=lambda j: j.created_at), (0.55, 0.7, 0.93), strict=True):
        end(session, job, loss=1.0, memory=10**9, seconds=9, accuracy=share)
    expect(page.get_by_text("More data would very likely help.")).to_be_visible(timeout=15_000)
    look_at(page, "learning-curve", tmp_path)


@pytest.mark.long
def test_results_of_finished_jobs(page: Page, served: str, session, user, tiny_registered, tmp_path: Path):
    pages = {
        "job-generation": finish(session, user, tiny_registered, GENERATION, forgotten(1.2)),
        "job-few-classes": finish(session, user, tiny_registered, classified(6), forgotten(1.0)),
        "job-77-classes": finish(session, user, tiny_registered, classified(77, rows=3000)),
    }
    for name, where in pages.items():
        page.goto(f"{served}{where}?tab=evaluation")
        page.locator("#scores-title").wait_for()
        look_at(page, name, tmp_path)


@pytest.mark.long
def test_the_form_of_a_job_with_advice_and_rows_to_check_with(
    page: Page, served: str, session, user, tiny_registered, kinds, tmp_path: Path
):
    from tests.factories import upload
    from tests.routes.test_new_job_choices import public

    other = upload(session, user, [{"text": f"another {n}", "label": "abx"[n % 3]} for n in range(9)], "others.jsonl")
    page.goto(f"{served}/jobs/new?model=tiny&dataset={public(kinds)}")
    expect(page.locator("#methods .card.on")).to_contain_text("Recommended")
    expect(page.locator("#start")).to_be_enabled()
    page.locator("#advanced > summary").click()
    page.locator("#validation").select_option(public(other))
    expect(page.locator("#before")).to_contain_text("is in no training row: “x”")
    expect(page.locator("#start")).to_be_disabled()
    look_at(page, "new-job-validation", tmp_path)
    page.locator("#validation").select_option("")
    expect(page.locator("#start")).to_be_enabled()
