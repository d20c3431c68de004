"""Distillation by a dataset: a teacher's answers by the real engine, what is kept of them, runs that are interrupted, the API and the page."""

from __future__ import annotations

import json
from typing import Any

import pytest
from sqlalchemy import select

from app.datasets import ingest_task, versions
from app.datasets import service as datasets
from app.datasets.row_store import read_rows
from app.distillations import service as distillations
from app.errors import BadField, Conflict
from app.kit import ids
from app.settings import get_settings
from app.tables import Dataset, DistillationRun, DistilledRow, TokenUse
from tests.factories import make_dataset
from worker.evaluation import distillations as work
from worker.evaluation import row_answers

VOWELS = {
    "type": "python",
    "name": "vowels",
    "source": "def grade(sample, item):\n    t = sample['output_text']\n    return sum([1 for c in t if c in 'aeiou']) / (1 + len(t))",
}
ORDER: dict[str, Any] = {
    "rows": 12,
    "answers": 3,
    "grader": VOWELS,
    "threshold": 0.15,
    "max_tokens": 48,
    "temperature": 1.0,
    "allows_training": True,
}


@pytest.fixture
def prompts(session, user, data_dir, tiny_registered) -> Dataset:
    return make_dataset(session, user, data_dir, 20)


def ordered(session, user, dataset: Dataset, **more: Any) -> DistillationRun:
    run = distillations.create(session, user, "tiny", dataset, distillations.read_order({**ORDER, **more}))
    session.commit()
    return run


def now_of(session, run: DistillationRun) -> DistillationRun:
    session.expire_all()
    return session.get_one(DistillationRun, run.id)


def stored(session, run: DistillationRun) -> dict[int, Any]:
    session.expire_all()
    found = session.scalars(select(DistilledRow).where(DistilledRow.run_id == run.id))
    return {row.line: (row.messages, row.answers, row.best) for row in found}


def test_the_best_answers_become_a_dataset_that_says_where_they_come_from(session, user, prompts) -> None:
    run = ordered(session, user, prompts, system="Be brief.", name="Vowels")
    work.work(run.id)
    run = now_of(session, run)
    assert run.status == "succeeded", run.error
    rows, kept = stored(session, run), 0
    assert len(rows) == 12 and run.result["prompts"] == 12
    for messages, answers, best in rows.values():
        assert messages[0] == {"role": "system", "content": "Be brief."} and len(answers) == 3 and len({one["text"] for one in answers}) > 1
        scores = [one["score"] for one in answers]
        for one in answers:
            vowels = sum(c in "aeiou" for c in one["text"]) / (1 + len(one["text"]))
            assert one["score"] == pytest.approx(vowels) or (one["score"] is None and "cut off" in one["why"])
        known = [score for score in scores if score is not None]
        assert (best is None) == (not known or max(known) < 0.15) and (best is None or scores[best] == max(known))
        kept += best is not None
    assert run.result["kept"] == kept > 0 and run.result["interval"][0] < run.result["share"] <= run.result["interval"][1]
    made = session.get_one(Dataset, run.made_id)
    expected = {
        "operation": "distillation",
        "teacher": "tiny",
        "license": "apache-2.0",
        "grader": "vowels",
        "threshold": 0.15,
        "kept": kept,
        "prompts": 12,
    }
    assert made.name == "Vowels" and expected.items() <= made.origin.items()
    assert f"Answers of tiny (apache-2.0) to 12 prompts, {kept} of them kept by vowels from 0.15" in versions.describe(made)
    ingest_task.read(made.id)
    session.expire_all()
    assert (made.status, made.good_rows, made.format) == ("ready", kept, "chat")
    lines = [json.loads(text) for _, text in read_rows(get_settings().data_dir / datasets.reference(made).path)]
    for row in lines:
        messages, answers, best = rows[int(row["metadata"]["source_line"])]
        assert row["messages"] == [*messages[1:], {"role": "assistant", "content": answers[best]["text"]}], (
            "the teacher's instructions are not taught"
        )
    assert session.scalars(select(TokenUse)).first().written > 12 * 3


def test_an_interrupted_run_goes_on_and_answers_no_prompt_twice(session, user, prompts, monkeypatch) -> None:
    monkeypatch.setattr(row_answers, "AT_ONCE", 2)
    cut = ordered(session, user, prompts)
    looked = iter([False, False, True])
    work.work(cut.id, lambda: next(looked, True))
    half = stored(session, cut)
    assert 0 < len(half) < 12 and now_of(session, cut).status == "running"
    session.execute(DistillationRun.__table__.update().where(DistillationRun.id == cut.id).values(lease_until="1970-01-01"))
    session.commit()
    distillations.reap(session)
    session.commit()
    assert now_of(session, cut).status == "queued"
    work.work(cut.id)
    found = stored(session, cut)
    assert len(found) == 12 and all(found[line] == row for line, row in half.items())
    row = now_of(session, cut)
    assert row.status == "succeeded" and row.result["prompts"] == 12 and row.result["asked_of"] == 12


def test_what_ends_without_a_dataset_says_why_and_can_go_on(session, user, prompts) -> None:
    high = ordered(session, user, prompts, threshold=1.0, rows=3)
    work.work(high.id)
    error = now_of(session, high).error
    assert error["code"] == "nothing_kept" and "None of the answers to 3 prompts reached 1: " in error["message"]
    waiting = ordered(session, user, prompts, rows=3)
    with pytest.raises(Conflict, match="has not ended"):
        distillations.delete(session, waiting)
    with pytest.raises(Conflict, match="The run is queued"):
        distillations.resume(session, user, waiting)
    distillations.cancel(session, waiting)
    session.commit()
    work.work(waiting.id)
    assert now_of(session, waiting).status == "cancelled" and not stored(session, waiting)
    distillations.resume(session, user, waiting)
    session.commit()
    work.work(waiting.id)
    assert now_of(session, waiting).status in ("succeeded", "failed") and len(stored(session, waiting)) == 3


@pytest.mark.parametrize(
    ("more", "param", "says"),
    [
        ({"allows_training": False}, "allows_training", "Some licenses forbid"),
        ({"grader": None}, "answers", "Without a grader no answer is the best of several"),
        ({"threshold": 2}, "threshold", "threshold cannot be 2"),
        ({"answer": 3}, "answer", "no setting"),
        ({"grader": {"type": "numeric"}}, "grader.0.name", "missing"),
    ],
)
def test_what_cannot_be_honored_is_refused(session, user, prompts, more, param, says) -> None:
    with pytest.raises(BadField, match=says) as caught:
        ordered(session, user, prompts, **more)
    assert caught.value.param == param


def test_a_teacher_of_unknown_license_is_asked_for_it(session, user, prompts, tiny_registered) -> None:
    tiny_registered.license = None
    session.commit()
    with pytest.raises(BadField, match="The license of tiny is not known here") as caught:
        ordered(session, user, prompts)
    assert caught.value.param == "license"
    assert ordered(session, user, prompts, license="MIT").spec["license"] == "MIT"


def test_the_api_and_the_page(session, user, api, client, prompts) -> None:
    body = {**ORDER, "model": "tiny", "dataset_id": ids.public(ids.DATASET, prompts.id), "threshold": 0.0}
    made = api.post("/v1/distillations", json=body)
    assert made.status_code == 200, made.text
    key = made.json()["id"]
    assert made.json()["status"] == "queued" and api.get("/v1/distillations").json()["data"][0]["id"] == key
    assert api.post("/v1/distillations", json={"model": "tiny"}).json()["error"]["param"] == "dataset_id"
    page = client.get("/distillations")
    assert page.status_code == 200 and "tiny" in page.text and "number" in page.text
    work.work(ids.parse_distillation(key))
    found = api.get(f"/v1/distillations/{key}").json()
    assert found["status"] == "succeeded" and 1 <= found["result"]["kept"] <= 12 and found["result_dataset_id"].startswith("ds-")
    rows = api.get(f"/v1/distillations/{key}/rows?limit=3").json()
    assert len(rows["data"]) == 3 and rows["has_more"] and rows["data"][0]["answers"][0]["text"]
    shown = client.get(f"/distillations/{key}").text
    assert "Fine-tune a student" in shown and f"{found['result']['kept']} of 12" in shown and "apache-2.0" in shown
    assert api.post(f"/v1/distillations/{key}/resume").status_code == 409
    assert api.delete(f"/v1/distillations/{key}").json()["deleted"] and api.get(f"/v1/distillations/{key}").status_code == 404

    form = {
        "model": "tiny",
        "dataset": body["dataset_id"],
        "grader": "similar",
        "order.rows": "3",
        "order.answers": "2",
        "order.threshold": "0.2",
    }
    refused = client.post("/distillations", data=form)
    assert refused.status_code == 400 and "Some licenses forbid" in refused.text and 'value="3"' in refused.text
    started = client.post("/distillations", data={**form, "allows_training": "on"}, follow_redirects=False)
    assert started.status_code == 303 and started.headers["location"].startswith("/distillations/distill-")
    assert client.post(f"{started.headers['location']}/cancel", follow_redirects=True).status_code == 200
