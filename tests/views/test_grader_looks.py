"""The pages of graders in a real browser: written, tried on rows next to labels by hand, saved; light, dark, 1280 and 320 px."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.tables import SavedGrader
from tests.generating import _workers, answering_dir, generate_worker, register_tiny  # noqa: F401
from tests.looks import look_at
from tests.routes.test_advice import chats  # noqa: F401  a fixture

pytestmark = pytest.mark.browser


@pytest.mark.long
def test_a_grader_is_written_tried_and_saved(page, served: str, session, chats, tmp_path: Path):  # noqa: F811
    page.goto(f"{served}/graders")
    look_at(page, "graders-empty", tmp_path)
    page.get_by_role("link", name="New grader").first.click()
    page.get_by_role("link", name="Python", exact=True).click()
    page.get_by_label("Name", exact=True).fill("Polite")
    page.get_by_label("Source").fill("import numpy\ndef grade(sample, item):\n    return 1.0")
    page.get_by_role("button", name="Save").click()
    assert (
        "there is no module numpy" in page.locator(".fault").first.inner_text().lower()
        or "numpy" in page.locator(".fault").first.inner_text()
    )
    page.get_by_label("Source").fill("def grade(sample, item):\n    return 1.0 if 'sorry' in sample['output_text'] else 0.2")
    answers, labels = page.get_by_label("Answer to line"), page.get_by_label("Label of line")
    assert answers.count() == 5 and answers.first.input_value(), "the expected answers"
    answers.nth(0).fill("I am sorry.")
    answers.nth(1).fill("Wait longer.")
    answers.nth(2).fill("Not sorry.")
    for place, label in enumerate(("good", "bad", "bad")):
        labels.nth(place).select_option(label)
    page.get_by_role("button", name="Grade these answers").click()
    assert "agrees with 2 of 3 labels" in page.locator("#agreement").inner_text()
    assert page.get_by_text("disagrees").count() == 1 and session.query(SavedGrader).count() == 0
    look_at(page, "grader-tried", tmp_path)
    page.get_by_role("button", name="Save").click()
    page.wait_for_url("**/graders/grader-*")
    assert session.query(SavedGrader).one().body["type"] == "python"
    page.goto(f"{served}/graders")
    look_at(page, "graders", tmp_path)
    page.get_by_role("link", name="Polite").click()
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete").click()
    page.get_by_text("Deleted “Polite”").wait_for()


@pytest.mark.long
def test_a_judge_compares_two_models(page, served: str, session, chats, generate_worker, tmp_path: Path):  # noqa: F811
    register_tiny(session), register_tiny(session, "other")
    page.goto(f"{served}/graders/new?type=label_model")
    page.locator("[name='grader.model']").fill("tiny")
    page.get_by_label("Other model").select_option("other")
    page.get_by_role("button", name="Compare the answers of both models").click(timeout=120_000)
    page.get_by_text("Which of two answers is better").wait_for()
    assert page.get_by_role("region", name="Compared answers").locator("tbody tr").count() == 5
    look_at(page, "grader-compared", tmp_path)


@pytest.mark.parametrize("kind", ["text_similarity", "multi", "json_schema", "score_model"])
def test_the_form_of_a_type_is_filled_with_an_example_that_can_be_tried(client, chats, kind):  # noqa: F811
    shown = client.get(f"/graders/new?type={kind}").text
    assert 'aria-current="true"' in shown and "Try it on 5 rows" in shown
