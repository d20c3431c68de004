"""Requests for reinforcement: in the words of OpenAI's client and in ours, what is refused, and the form."""

from __future__ import annotations

import json
import shutil
from typing import Any

import openai
import pytest

from app.datasets import ingest_task
from app.datasets import service as datasets
from app.errors import BadField
from app.kit import ids
from app.models.dependants import dependants
from app.objectives.reinforcement import ReinforcementSettings
from app.planning.reinforcement import refuse_drawn
from app.run_settings import RunSettings
from app.shapes import shape_of
from app.spec import JobSpec
from app.storage import files
from app.strategies import STRATEGIES
from app.tables import Job, Model
from benchmarks.shapes import config_of
from tests.factories import make_dataset

NUMBER = {"type": "numeric", "name": "right", "reference": "{{item.reference}}"}
JUDGE = {"type": "score_model", "name": "judge", "model": "tiny", "input": [{"role": "user", "content": "x"}]}


def hyper(**given: Any) -> dict[str, Any]:
    return {"method": {"type": "reinforcement", "reinforcement": {"hyperparameters": given}}}


@pytest.fixture
def file_id(session, user, data_dir, tiny_registered) -> str:
    return ids.public(ids.FILE, make_dataset(session, user, data_dir).file_id)


def spec_of(session, job: Any) -> JobSpec:
    session.expire_all()
    return JobSpec.model_validate(session.get_one(Job, ids.parse(ids.JOB, job.id)).spec)


def test_the_clients_words_are_ours(session, openai_client, file_id):
    asked = {
        "n_epochs": 2,
        "batch_size": 3,
        "compute_multiplier": 0.5,
        "eval_interval": 4,
        "eval_samples": 9,
        "learning_rate_multiplier": 0.5,
    }
    method = {"type": "reinforcement", "reinforcement": {"grader": NUMBER, "hyperparameters": asked}}
    job = openai_client.fine_tuning.jobs.create(model="tiny", training_file=file_id, method=method)
    spec = spec_of(session, job)
    assert (spec.task, spec.preference.grader) == ("reinforcement", NUMBER)
    assert (spec.preference.prompts_per_step, spec.preference.group_size) == (3, 4)
    assert (spec.run.epochs, spec.run.eval_steps, spec.run.evaluations_per_epoch, spec.run.graded_rows) == (2, 4, 0, 9)
    told = openai_client.fine_tuning.jobs.retrieve(job.id).method
    assert told.type == "reinforcement" and told.reinforcement.grader.type == "numeric"
    assert {name: getattr(told.reinforcement.hyperparameters, name) for name in asked} == asked
    plain = openai_client.fine_tuning.jobs.create(model="tiny", training_file=file_id)
    assert spec_of(session, plain).task == "generation"


def test_a_saved_grader_is_copied_and_a_default_schedule_has_enough_steps(session, api, openai_client, file_id):
    saved = api.post("/v1/graders", json={"grader": NUMBER}).json()["id"]
    ours = {"task": "reinforcement", "preference": {"grader": saved, "variant": "dr_grpo", "prompts_per_step": 4}}
    job = openai_client.fine_tuning.jobs.create(model="tiny", training_file=file_id, extra_body=ours)
    spec = spec_of(session, job)
    assert spec.preference.grader == NUMBER and spec.preference.loss.average == "limit"
    estimate = api.get(f"/v1/fine_tuning/jobs/{job.id}").json()["estimate"]
    assert estimate["steps"] >= 60 and estimate["seconds"] > 0 and estimate["memory_bytes"] > 0


def test_several_updates_make_more_steps_of_as_many_answers(session, api, openai_client, file_id):
    """In an estimate too: twice the steps, in less than twice the time, because as much is drawn."""

    def estimate(**own: Any) -> dict[str, Any]:
        ours = {"task": "reinforcement", "preference": {"grader": NUMBER, "prompts_per_step": 4} | own, "run": {"epochs": 40}}
        job = openai_client.fine_tuning.jobs.create(model="tiny", training_file=file_id, extra_body=ours)
        return api.get(f"/v1/fine_tuning/jobs/{job.id}").json()["estimate"]

    one, two, talking = estimate(), estimate(updates_per_batch=2), estimate(max_turns=2)
    assert two["steps"] == 2 * one["steps"] and two["tokens"] == pytest.approx(2 * one["tokens"], rel=0.01)
    assert 1.05 * one["seconds"] < two["seconds"] < 1.95 * one["seconds"] < 1.95 * talking["seconds"]


def test_a_judge_is_a_reward_with_the_weights_that_it_had(session, openai_client, file_id, tiny_registered):
    ours = {"task": "reinforcement", "preference": {"grader": JUDGE}, "graders": [JUDGE | {"name": "second"}]}
    job = openai_client.fine_tuning.jobs.create(model="tiny", training_file=file_id, extra_body=ours)
    (asked,) = spec_of(session, job).judges
    assert (asked.name, asked.model.id, asked.model.revision) == ("tiny", tiny_registered.id, tiny_registered.revision)
    assert any("A grader of the job" in why for why in dependants(session, tiny_registered).reasons)
    with pytest.raises(openai.BadRequestError, match="a job of several processes cannot"):
        openai_client.fine_tuning.jobs.create(model="tiny", training_file=file_id, extra_body=ours | {"resources": {"gpus": 2}})


@pytest.mark.parametrize(
    ("ask", "param", "says"),
    [
        ({}, "preference.grader", "needs a reward"),
        ({"preference": {"grader": {"type": "numeric"}}}, "preference.grader.name", "missing"),
        ({"preference": {"grader": "grader-" + "0" * 32}}, "preference.grader", "No such grader"),
        ({"preference": {"grader": JUDGE | {"model": "nobody"}}}, "preference.grader.model", "nobody"),
        ({"preference": {"grader": {"type": "reward_model", "name": "r", "model": "tiny"}}}, "preference.grader.model", "no reward model"),
        ({"preference": {"grader": NUMBER, "group_size": 1}}, "preference.group_size", "cannot be 1"),
        ({"preference": {"grader": NUMBER}, "run": {"batch_size": 4}}, "run.batch_size", "prompts_per_step"),
        (
            {"preference": {"grader": NUMBER}, "run": {"gradient_accumulation_steps": 2}},
            "run.gradient_accumulation_steps",
            "prompts_per_step",
        ),
        ({"preference": {"grader": NUMBER, "kl": 0.1}, "strategy": {"name": "full"}}, "preference.kl", "has none"),
        ({"preference": {"grader": NUMBER}, **hyper(batch_size=-1)}, "hyperparameters.batch_size", "batch_size cannot be -1"),
        ({"preference": {"grader": NUMBER}, **hyper(compute_multiplier=9)}, "hyperparameters.compute_multiplier", "from 0.25 to 8"),
        ({"preference": {"grader": NUMBER}, **hyper(eval_samples=1)}, "hyperparameters.eval_samples", "from 5 to 2000"),
        ({"preference": {"grader": NUMBER}, **hyper(eval_interval=0)}, "hyperparameters.eval_interval", "eval_interval cannot be 0"),
        ({"preference": {"grader": NUMBER, "answer_tokens": 4000}}, "preference.answer_tokens", "leave no room"),
        ({"preference": {"grader": NUMBER, "beta": 1}}, "preference.beta", "no setting"),
        ({"preference": {"grader": NUMBER}, "strategy": {"name": "feature_extraction"}}, "strategy", "does not support"),
        ({"preference": {"grader": NUMBER}, "run": {"rehearsal_fraction": 0.1}}, "run.rehearsal_fraction", "does not train on"),
        ({"preference": {"grader": NUMBER}, "run": {"packing": False}}, "run.packing", "always packed"),
        ({"preference": {"grader": NUMBER, "updates_per_batch": 0}}, "preference.updates_per_batch", "cannot be 0"),
        ({"preference": {"grader": NUMBER, "tool_source": "def call(n, a, i): return 1"}}, "preference.tool_source", "no tool is asked"),
        ({"preference": {"grader": NUMBER, "max_turns": 2, "tool_source": "x = 1"}}, "preference.tool_source", "no function call"),
    ],
)
def test_what_cannot_be_honored_is_refused(openai_client, file_id, ask, param, says):
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as caught:
        openai_client.fine_tuning.jobs.create(model="tiny", training_file=file_id, extra_body={"task": "reinforcement", **ask})
    assert caught.value.param == param and says in caught.value.message


def test_no_penalty_compares_with_biases_that_were_trained():
    own, run = ReinforcementSettings(grader=NUMBER, kl=0.1), RunSettings(max_tokens_per_step=2048)
    shape = shape_of(config_of("starter").to_dict())
    refuse_drawn(STRATEGIES["lora"](), run, own, shape)
    with pytest.raises(BadField, match="biases that were trained stay") as caught:
        refuse_drawn(STRATEGIES["lora"](bias="all"), run, own, shape)
    assert caught.value.param == "preference.kl"


def test_the_form_offers_the_objective_and_a_reward(session, client, api, user, data_dir, tiny_registered):
    data = ids.public(ids.DATASET, make_dataset(session, user, data_dir).id)
    saved = api.post("/v1/graders", json={"grader": NUMBER | {"name": "my own"}}).json()["id"]
    page = client.get("/jobs/new", params={"model": "tiny", "dataset": data}).text
    assert '<option value="reinforcement">' in page and 'name="preference.grader"' not in page
    typed = {
        "model": "tiny",
        "dataset": data,
        "strategy": "lora",
        "objective": "reinforcement",
        "task": "generation",
        "preference.group_size": "4",
    }
    page = client.get("/jobs/new", params=typed).text
    assert f'<option value="{saved}">my own</option>' in page and 'name="preference.group_size"' in page and "Fits in memory" in page
    assert client.post("/jobs", data=typed | {"preference.grader": saved}, follow_redirects=False).status_code == 303
    job = session.query(Job).one()
    assert (job.spec["task"], job.spec["preference"]["grader"]["name"], job.spec["preference"]["group_size"]) == (
        "reinforcement",
        "my own",
        4,
    )
    clone = client.get("/jobs/new", params={"clone": ids.public(ids.JOB, job.id)}).text
    assert "that of the cloned run" in clone and '<option value="reinforcement" selected>' in clone
    again = client.post("/jobs", data=typed | {"preference.grader": '{"type": "nothing"}'}, follow_redirects=False)
    assert again.status_code == 400 and "There is no type of grader" in again.text


def pairs_file(session, user) -> str:
    """A dataset of preference pairs, read by the data worker's own code."""
    lines = [json.dumps({"prompt": f"Say {i}.", "chosen": f"It is {i}.", "rejected": "No idea."}) for i in range(30)]
    file = files.add_bytes(session, user, "\n".join(lines).encode(), "pairs.jsonl", "fine-tune")
    made = datasets.create(session, user, file)
    session.commit()
    ingest_task.read(made.id)
    return ids.public(ids.DATASET, made.id)


def test_pairs_train_a_reward_model_where_that_is_asked(session, user, client, openai_client, data_dir, tiny_registered):
    data = pairs_file(session, user)
    given = {"dataset_id": data, "preference": {"centering": 0.1}}
    job = openai_client.fine_tuning.jobs.create(model="tiny", training_file="", method={"type": "reward"}, extra_body=given)  # type: ignore[typeddict-item]
    spec = spec_of(session, job)
    assert (spec.task, spec.preference.centering, spec.strategy.name) == ("reward", 0.1, "lora")
    assert spec.learning_rate == STRATEGIES["lora"].learning_rate_for("generation"), "a new head is trained"
    told = openai_client.fine_tuning.jobs.retrieve(job.id)
    assert told.method.type == "reward" and told.estimate["trainable_parameters"] > 0
    assert "task: reward" in client.get(f"/jobs/{job.id}/job.yaml").text
    form = {"model": "tiny", "dataset": data, "objective": "reward", "task": "preference"}
    page = client.get("/jobs/new", params=form).text
    assert '<option value="reward" selected>Reward model' in page and 'name="preference.centering"' in page and "Fits in memory" in page
    clone = client.get("/jobs/new", params={"clone": job.id}).text
    assert '<option value="reward" selected>' in clone
    with pytest.raises(openai.BadRequestError, match="does not support the task reward"):
        more = given | {"task": "reward", "strategy": {"name": "feature_extraction"}}
        openai_client.fine_tuning.jobs.create(model="tiny", training_file="", extra_body=more)
    with pytest.raises(openai.BadRequestError, match="writes none"):
        openai_client.fine_tuning.jobs.create(model="tiny", training_file="", extra_body=given | {"task": "reward", "graders": [NUMBER]})


def test_a_teacher_is_asked_for_and_has_the_same_vocabulary(session, client, api, openai_client, file_id, data_dir, tiny_registered):
    row = session.get_one(Model, tiny_registered.id)
    other = data_dir / "models" / "other"
    shutil.copytree(data_dir / row.path, other)
    told = json.loads((other / "tokenizer.json").read_text())
    told["model"]["vocab"] = dict(zip(told["model"]["vocab"], reversed(told["model"]["vocab"].values()), strict=True))
    (other / "tokenizer.json").write_text(json.dumps(told))
    about = {name: getattr(row, name) for name in ("kind", "revision", "source", "shape", "bytes", "license")}
    for name, path in (("teacher", row.path), ("stranger", "models/other")):
        session.add(Model(name=name, title=name, path=path, **about))
    session.commit()
    own = {"task": "distillation", "preference": {"teacher": "teacher", "divergence": "jsd"}}
    job = openai_client.fine_tuning.jobs.create(model="tiny", training_file=file_id, extra_body=own)
    spec = spec_of(session, job)
    assert (spec.teacher.name, spec.preference.divergence, spec.preference.group_size) == ("teacher", "jsd", 1)
    estimate = api.get(f"/v1/fine_tuning/jobs/{job.id}").json()["estimate"]
    plain = openai_client.fine_tuning.jobs.create(model="tiny", training_file=file_id)
    assert estimate["memory"]["other"] > api.get(f"/v1/fine_tuning/jobs/{plain.id}").json()["estimate"]["memory"]["other"]
    assert any("distills it" in why for why in dependants(session, session.get_one(Model, spec.teacher.id)).reasons)
    for teacher, says in (
        ("", "needs a teacher"),
        ("tiny", "the student itself"),
        ("stranger", "another vocabulary: only "),
        ("nobody", "nobody"),
    ):
        with pytest.raises(openai.APIStatusError, match=says) as caught:
            openai_client.fine_tuning.jobs.create(
                model="tiny", training_file=file_id, extra_body={"task": "distillation", "preference": {"teacher": teacher}}
            )
        assert caught.value.param == "preference.teacher"
    page = client.get(
        "/jobs/new", params={"model": "tiny", "dataset": spec_dataset(spec), "objective": "distillation", "task": "generation"}
    ).text
    assert 'name="preference.teacher"' in page and '<option value="stranger"' in page
    assert '<option value="tiny"' not in page.split('name="preference.teacher"')[1].split("</select>")[0]


def spec_dataset(spec: JobSpec) -> str:
    return ids.public(ids.DATASET, spec.dataset.id)
