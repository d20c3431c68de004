"""Evaluations, the curve of a blend and measured advice in a real browser: light, dark, 1280 and 320 px wide, with axe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from app.evaluation import service as evaluations
from app.kit import ids
from app.tables import Evaluation
from tests.lives import order, running
from tests.looks import look_at
from tests.routes.test_advice import chats  # noqa: F401  a fixture

pytestmark = pytest.mark.browser


def record(session, user, model, dataset, kind: str = "scores", status: str = "succeeded", rows: int = 60, **columns: Any) -> Evaluation:
    body = {"model": model.name, "dataset_id": ids.public(ids.DATASET, dataset.id), "kind": kind, "rows": rows}
    made = evaluations.create(session, user, evaluations.read_order(body))
    made.status = status
    for name, value in columns.items():
        setattr(made, name, value)
    session.commit()
    return made


def points() -> dict[str, Any]:
    found = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        forgot = 0.16 * share**3
        spread = [forgot - 0.02, forgot + 0.025] if share else [0.0, 0.0]
        scores = {"loss": 2.51 - 1.38 * share ** (1 / 3), "token_accuracy": 0.48 + 0.23 * share}
        verdict = None if not share else "within noise" if share < 0.5 else "forgot much" if share == 1 else "forgot some"
        found.append(
            {"blend": share, "score": scores["loss"], "scores": scores, "forgetting": forgot, "interval": spread, "verdict": verdict}
        )
    return {"rows": 120, "skipped": 0, "points": found, "best": 0.75, "advice": "", "seconds": 48.0}


def scores() -> dict[str, Any]:
    base = {
        "loss": 2.51,
        "perplexity": 12.3,
        "bits_per_byte": 0.92,
        "token_accuracy": 0.48,
        "exact_match": 0.0,
        "rouge_l": 0.21,
        "chrf": 0.28,
    }
    rows = [
        {"line": 7 + i, "prompt": "My parcel is a week late. What can I do?", "reference": "I am sorry for the wait.", "base_loss": 2.4,
         "tuned_loss": 1.1 + i, "base_answer": "There are several reasons why a parcel may be late.", "tuned_answer": "I am sorry."} for i in range(3)
    ]  # fmt: skip
    tuned = {name: value * 0.5 if name in ("loss", "perplexity", "bits_per_byte") else value + 0.2 for name, value in base.items()}
    return {
        "rows": 120,
        "skipped": 2,
        "answers": 8,
        "scores": tuned,
        "base": base,
        "worst": rows,
        "best": rows[::-1],
        "forgetting": None,
        "seconds": 95.0,
    }


@pytest.mark.long
def test_pages(page, served: str, session, user, tiny_registered, chats, tmp_path: Path):  # noqa: F811
    from app.tables import Model

    job = running(session, user, tiny_registered).say().finish()
    tuned = session.query(Model).filter_by(job_id=job.job_id).one()
    scored = record(session, user, tuned, chats, result=scores(), progress=1.0)
    record(session, user, tuned, chats, "blend", result=points())
    moving = record(session, user, tiny_registered, chats, status="running", progress=0.4, stage="Reading 60 rows with tiny")
    failed = record(
        session, user, tiny_registered, chats, status="failed", rows=61,
        error={"code": "out_of_memory", "message": "The machine ran out of memory.", "hint": "Take a smaller model."},
    )  # fmt: skip
    found = {
        "rows": 60, "distance": 1.31, "data_bits_per_byte": 1.2, "general_bits_per_byte": 0.92, "zero_shot": {"rouge_l": 0.09, "bits_per_byte": 2.05},
        "few_shot": {"rouge_l": 0.29, "bits_per_byte": 1.12}, "prompted_rows": 6, "shots": 4, "chance": None, "how": "answers", "reason": None,
    }  # fmt: skip
    record(session, user, tiny_registered, chats, "advice", result=found)
    key = lambda e: f"/evaluations/{ids.public(ids.EVALUATION, e.id)}"  # noqa: E731
    places = {
        "evaluations": "/evaluations", "evaluation": key(scored), "evaluation-running": key(moving), "evaluation-failed": key(failed),
        "blend-model": f"/models/{ids.public(ids.MODEL, tuned.id)}?tab=evaluations",
        "advice-measured": f"/jobs/advice?model=tiny&dataset={ids.public(ids.DATASET, chats.id)}",
    }  # fmt: skip
    for name, path in places.items():
        page.goto(served + path)
        look_at(page, name, tmp_path)
    for path in (places["blend-model"], f"/jobs/{ids.public(ids.JOB, job.job_id)}?tab=evaluation"):
        page.goto(served + path)
        assert page.locator("#blend polyline").count() == 2
    page.locator("#blend-of > summary").click()
    page.get_by_role("link", name="Try it at").click()
    assert page.locator("select[name=models]").nth(1).input_value() == f"{tuned.name}@0.75"


@pytest.mark.long
def test_a_running_evaluation_follows_and_is_stopped(page, served: str, session, user, tiny_registered, chats):  # noqa: F811
    order(session, user, tiny_registered)
    page.goto(f"{served}/evaluations")
    page.get_by_label("Dataset").select_option(label="replies")
    page.get_by_role("button", name="Evaluate", exact=True).click()
    page.wait_for_url("**/evaluations/eval-*")
    assert "No evaluate worker is online" in page.locator("#evaluation").inner_text()
    made = session.query(Evaluation).one()
    made.status, made.progress, made.stage = "running", 0.5, "Reading half of it"
    session.commit()
    page.get_by_text("Reading half of it").wait_for(timeout=10_000)
    page.get_by_role("button", name="Cancel").click()
    page.get_by_text("Cancelled").wait_for(timeout=10_000)
