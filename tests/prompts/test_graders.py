"""A saved grader as the metric of the prompt lab."""

from __future__ import annotations

import pytest

from app import graders, saved_graders
from app.errors import BadField
from app.kit import ids
from app.prompts import runs as prompt_runs
from app.prompts import service as prompts
from app.tables import PromptResult
from tests.generating import register_tiny
from tests.prompts.test_service import sums  # noqa: F401  a fixture
from worker.evaluation import prompt_runs as worker_runs


def saved(session, user, **fields):
    made = saved_graders.create(session, user, graders.read({"name": "g", **fields}))
    session.commit()
    return ids.public(ids.GRADER, made.id)


def ran(session, user, dataset, key):
    register_tiny(session)
    body = prompts.read_body({"score": "grader", "grader": key, "max_tokens": 4})
    _, version = prompts.create(session, user, "Graded", body)
    run = prompt_runs.create(session, user, version, "tiny", dataset, prompt_runs.RunOrder(rows=6))
    session.commit()
    worker_runs.work(run.id)
    session.expire_all()
    return run


def test_a_run_is_scored_by_the_grader_as_it_was(session, user, sums):  # noqa: F811
    key = saved(session, user, type="python", source="def grade(sample, item):\n    return 0.25 if '####' in item['reference'] else 1.0")
    run = ran(session, user, sums, key)
    assert run.status == "succeeded", run.error
    assert run.result["score"] == 0.25 and run.result["rows"] == 6 and run.spec["grader"]["type"] == "python"
    assert session.query(PromptResult).filter_by(run_id=run.id).count() == 6


def test_rows_that_cannot_be_graded_are_excluded(session, user, sums):  # noqa: F811
    key = saved(session, user, type="string_check", input="{{item.nothing}}", operation="eq", reference="x")
    run = ran(session, user, sums, key)
    assert run.status == "failed" and "nothing" in run.error["message"] and run.result["unanswered"] == 6


def test_metric_and_grader_belong_together(session, user):
    for body in ({"score": "grader"}, {"grader": "grader-" + "0" * 32}):
        with pytest.raises(BadField, match="belong together"):
            prompts.read_body(body)
