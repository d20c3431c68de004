"""Distillation, a reward model's job, and jobs that stop or pause by themselves in a real browser: light, dark, 1280 and 320 px wide, with axe."""

from __future__ import annotations

from pathlib import Path

import pytest

from app import events
from app.distillations import service as distillations
from app.jobs import lifecycle
from app.kit import ids
from app.tables import Dataset, DistilledRow
from tests.factories import make_dataset
from tests.lives import finished, running
from tests.looks import look_at

pytestmark = pytest.mark.browser
GRADER = {"type": "numeric", "name": "Right number", "reference": "{{item.reference}}"}


def answered(session, user, dataset: Dataset, status: str) -> str:
    """A run with two answered prompts, of one of which an answer was kept."""
    order = distillations.DistillationOrder(
        rows=40, answers=3, grader=GRADER, name="Sums, answered by tiny", license="MIT", allows_training=True
    )
    run = distillations.create(session, user, "tiny", dataset, order)
    for line, scores in ((2, (0.0, 1.0, None)), (5, (0.0, 0.0, 0.0))):
        told = [
            {"text": f"It is {line + place}.", "score": score, "why": "" if score is not None else "It was cut off by max_tokens."}
            for place, score in enumerate(scores)
        ]
        best = 1 if 1.0 in scores else None
        session.add(
            DistilledRow(run_id=run.id, line=line, messages=[{"role": "user", "content": "What is 1 + 2?"}], answers=told, best=best)
        )
    session.flush()
    run.status, run.progress = status, 0.05
    totals = {"tokens": 812, "prompt_tokens": 90, "seconds": 6.0, "unanswered": 1, "unanswered_lines": [9], "asked_of": 40}
    run.result = distillations.summary(session, run.id) | totals if status != "running" else totals
    if status == "succeeded":
        run.made_id = dataset.id
    session.commit()
    return ids.public(ids.DISTILLATION, run.id)


@pytest.mark.long
def test_distillation_looks_right(page, served: str, session, user, data_dir, tiny_registered, tmp_path: Path) -> None:
    dataset = make_dataset(session, user, data_dir, 40)
    keys = {status: answered(session, user, dataset, status) for status in ("succeeded", "running", "failed")}
    page.goto(f"{served}/distillations")
    page.get_by_text("More settings").click()
    look_at(page, "distillations", tmp_path)
    page.locator("#model").select_option("tiny")
    page.locator("#grader").select_option("number")
    page.get_by_role("button", name="Start").click()
    assert "Some licenses forbid" in page.locator("#allows-error").inner_text()
    page.get_by_label("license allows").check()
    page.get_by_role("button", name="Start").click()
    page.wait_for_url("**/distillations/distill-*")
    page.goto(f"{served}/distillations/{keys['succeeded']}")
    assert page.get_by_text("1 of 2").count() and page.get_by_text("Fine-tune a student").count()
    look_at(page, "distillation", tmp_path)
    page.goto(f"{served}/distillations/{keys['running']}")
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Resume").wait_for(timeout=10_000)


@pytest.mark.long
def test_a_job_says_why_it_stopped_or_paused(page, served: str, session, user, data_dir, tiny_registered, tmp_path: Path) -> None:
    life = running(session, user, tiny_registered)
    why = "The reward rises and the grader short falls: since step 24 the reward went from 0.20 to 0.55, and short changed by -0.40 to -0.12 with 95% confidence."
    lifecycle.finish(session, life.held, finished(74).model_copy(update={"reason": "early_stopped", "why": why, "best_step": 36}))
    session.commit()
    page.goto(f"{served}/jobs/{ids.public(ids.JOB, life.job_id)}")
    assert (
        why in page.locator("#stopped").inner_text() and "The result is the checkpoint of step 36." in page.locator("#stopped").inner_text()
    )
    assert "stopped by itself" in page.locator(".progress").first.inner_text()
    look_at(page, "stopped", tmp_path)
    paused = running(session, user, tiny_registered)
    paused.fail(
        events.Failed(
            kind="model_away",
            message="The grader vowels could not ask its model. Nobody is there.",
            hint="Bring that model back, then resume: nothing is lost.",
            step=74,
        )
    )
    page.goto(f"{served}/jobs/{ids.public(ids.JOB, paused.job_id)}")
    assert "could not ask its model" in page.get_by_role("alert").inner_text() and page.get_by_role("button", name="Resume").count()


@pytest.mark.long
def test_the_form_has_a_choice_of_a_teacher(page, served: str, session, user, data_dir, tiny_registered, tmp_path: Path) -> None:
    dataset = ids.public(ids.DATASET, make_dataset(session, user, data_dir).id)
    page.goto(f"{served}/jobs/new?model=tiny&dataset={dataset}")
    page.locator("#objective").select_option("distillation")
    page.locator("#preference-teacher").wait_for(timeout=15_000)
    look_at(page, "teacher", tmp_path)
