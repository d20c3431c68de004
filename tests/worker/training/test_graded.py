"""Graders while training: a curve at each evaluation, and the choice of the best checkpoint, which chance does not make."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from app import events
from app.kit import ids
from app.tables import Job
from tests.factories import chat_rows, make_dataset
from tests.worker.orders import order, put_dataset, put_model
from tests.worker.training.test_train import of, run
from worker.training.graded import _curves, clearly_better

SAME = {
    "type": "string_check",
    "name": "Same answer",
    "input": "{{sample.output_text}}",
    "operation": "eq",
    "reference": "{{item.reference}}",
}
CODE = {"type": "python", "name": "Words", "source": "def grade(sample, item):\n    return 1.0 if sample['output_text'].split() else 0.0"}
QUICK = {
    "validation_fraction": 0.3, "sample_tokens": 16, "epochs": 40, "evaluations_per_epoch": 0.25, "learning_rate": 2e-2, "max_tokens_per_step": 256,
}  # fmt: skip


def spec_of(tiny_model: Path, *graders, **more):
    made = order(put_model(tiny_model), put_dataset(chat_rows(60)), "full", **QUICK | more)
    return made.model_copy(update={"graders": graders})


@pytest.mark.long
def test_a_grader_is_a_curve_and_chooses_the_checkpoint(data_dir: Path, tiny_model: Path) -> None:
    spec = spec_of(tiny_model, SAME, CODE, metric_for_best="grader", early_stopping_patience=4)
    said = run(spec, data_dir)
    scored, finished = of(said, events.Evaluated), said[-1]
    curve = [e.metrics["grader_same_answer"] for e in scored]
    assert curve[0] == 0 and max(curve) > 0.5 and all(0 <= e.metrics["grader_words"] <= 1 for e in scored)
    bests = [e for e in scored if e.best]
    assert finished.best_step == bests[-1].step and finished.reason == "early_stopped"
    # The first that was clearly better than all before: what came after had as good a mean, and no more.
    assert len(bests) > 1 and bests[-1].metrics["grader_same_answer"] > curve[1] and finished.step > finished.best_step
    assert finished.evaluation["tuned"]["grader_same_answer"] == bests[-1].metrics["grader_same_answer"]
    again = run(spec, data_dir, "again")
    assert [e.metrics for e in of(again, events.Evaluated)] == [e.metrics for e in scored]


def test_answers_without_a_grade_are_said_and_stop_nothing(data_dir: Path, tiny_model: Path) -> None:
    absent = {"type": "string_check", "name": "absent", "input": "{{item.nothing}}", "operation": "eq", "reference": "x"}
    said = run(spec_of(tiny_model, absent, epochs=1), data_dir)
    assert isinstance(said[-1], events.Finished)
    assert any("have no grade. absent: The item has no item.nothing" in e.message for e in of(said, events.Log))
    assert not any("grader_absent" in e.metrics for e in of(said, events.Evaluated))


def test_what_is_called_better() -> None:
    zeros = [0.0] * 30
    assert clearly_better(zeros, [1.0] * 10 + [0.0] * 20) and not clearly_better(zeros, [1.0] * 2 + [0.0] * 28)
    assert not clearly_better(zeros[:4], [1.0] * 4), "four rows tell nothing"
    assert not clearly_better([0.5] * 30, [0.5 + (0.4 if n % 2 else -0.4) for n in range(30)])
    assert not clearly_better([None] * 30, [1.0] * 30)
    assert _curves(["A b", "a-b", "c"]) == ["grader_a_b", "grader_a_b_2", "grader_c"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"graders": [{"type": "length", "name": "x"}]}, "graders.0"), ({"run": {"metric_for_best": "grader"}}, "run.metric_for_best"),
        ({"graders": [SAME], "run": {"validation_fraction": 0}}, "graders"), ({"graders": ["grader-" + "0" * 32]}, "graders.0"),
        ({"graders": [{"type": "score_model", "name": "j", "model": "nobody", "input": [{"role": "user", "content": "x"}]}]}, "graders"),
    ],
)  # fmt: skip
def test_wrong_orders_name_the_field(api, session, user, data_dir, tiny_registered, change, param) -> None:
    dataset = make_dataset(session, user, data_dir)
    answer = api.post("/v1/fine_tuning/jobs", json={"model": "tiny", "dataset_id": ids.public(ids.DATASET, dataset.id)} | change)
    assert answer.status_code in (400, 404) and answer.json()["error"]["param"] == param, answer.text


def test_a_job_keeps_its_graders_as_they_were(api, session, user, data_dir, tiny_registered) -> None:
    dataset = make_dataset(session, user, data_dir)
    saved = api.post("/v1/graders", json={"grader": SAME}).json()
    body = {
        "model": "tiny",
        "dataset_id": ids.public(ids.DATASET, dataset.id),
        "graders": [saved["id"]],
        "run": {"metric_for_best": "grader"},
    }
    made = api.post("/v1/fine_tuning/jobs", json=body)
    assert made.status_code == 200, made.text
    api.delete(f"/v1/graders/{saved['id']}")
    job = session.get_one(Job, ids.parse_job(made.json()["id"]))
    assert job.spec["graders"] == [SAME]


def test_the_form_and_the_file_of_a_job_carry_its_graders(client, api, session, user, data_dir, tiny_registered) -> None:
    dataset = make_dataset(session, user, data_dir)
    saved = api.post("/v1/graders", json={"grader": SAME}).json()["id"]
    form = {"model": "tiny", "dataset": ids.public(ids.DATASET, dataset.id), "strategy": "lora", "run.metric_for_best": "grader"}
    shown = client.get("/jobs/new", params=form | {f"grader.{saved}": "on"})
    assert f'name="grader.{saved}" checked' in shown.text and "Same answer" in shown.text
    missing = client.post("/jobs", data=form, follow_redirects=False)
    assert missing.status_code == 400 and "No grader was named" in missing.text
    made = client.post("/jobs", data=form | {f"grader.{saved}": "on"}, follow_redirects=False)
    assert made.status_code == 303, made.text
    key = made.headers["location"].rpartition("/")[2]
    assert session.get_one(Job, ids.parse_job(key)).spec["graders"] == [SAME]
    written = yaml.safe_load(client.get(f"/jobs/{key}/job.yaml").text)
    assert written["graders"] == [SAME] and written["run"]["metric_for_best"] == "grader"
    clone = client.get(f"/jobs/new?clone={key}").text
    assert "those of the cloned run" in clone and "Same answer" in clone
    again = client.post("/jobs", data=form | {"graders": json.dumps([SAME]), "name": "again"}, follow_redirects=False)
    assert session.get_one(Job, ids.parse_job(again.headers["location"].rpartition("/")[2])).spec["graders"] == [SAME]
