"""`/v1/fine_tuning` through the unmodified `openai` client, against the real server on a real port."""

from __future__ import annotations

import contextlib
import json
import threading
import time
import uuid
from typing import Any

import httpx
import openai
import pytest

from app import events, queue
from app.datasets import ingest_task
from app.datasets import service as datasets
from app.db import transaction
from app.errors import NotFound
from app.inference import playground
from app.jobs import lifecycle
from app.jobs import service as jobs
from app.kit import ids
from app.models import service as models
from app.spec import JobSpec
from app.tables import Checkpoint, User
from app.web import auth, projects
from tests.factories import make_dataset
from tests.jobs.test_lifecycle import FINISHED, STARTED, saved, step, take


@pytest.fixture
def server(api, served):
    """The address of a live server, and a key."""
    return served, api.key


@pytest.fixture
def file_id(session, user, data_dir, tiny_registered):
    return ids.public(ids.FILE, make_dataset(session, user, data_dir).file_id)


def key_of(job) -> Any:
    return ids.parse(ids.JOB, job.id)


def test_create_answers_with_openais_fields_and_ours(openai_client, file_id):
    job = openai_client.fine_tuning.jobs.create(
        model="tiny",
        training_file=file_id,
        suffix="my-own",
        seed=7,
        metadata={"team": "a"},
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": 1.0}},
        },
        extra_body={"strategy": {"name": "lora", "rank": 4}, "run": {"max_tokens_per_step": 512}, "something_new": 1},
    )
    assert (job.object, job.status, job.model, job.training_file, job.seed) == ("fine_tuning.job", "queued", "tiny", file_id, 7)
    assert job.hyperparameters.n_epochs == 2 and job.hyperparameters.batch_size == "auto"
    assert job.method.supervised.hyperparameters.n_epochs == 2 and job.integrations == []
    assert job.metadata == {"team": "a"} and job.error is None and job.finished_at is None and job.result_files == []
    assert job.strategy["rank"] == 4 and job.run["max_tokens_per_step"] == 512 and job.run["epochs"] == 2
    assert job.estimate["seconds"] > 0 and job.progress["step"] == 0
    assert openai_client.fine_tuning.jobs.retrieve(job.id) == job


def test_the_deprecated_form_and_auto_everywhere(openai_client, file_id):
    auto = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}
    job = openai_client.fine_tuning.jobs.create(model="tiny", training_file=file_id, hyperparameters=auto)
    assert job.hyperparameters.n_epochs == "auto" and isinstance(job.seed, int) and job.run["epochs"] == 15


def test_lists_turn_pages_and_filter_by_metadata(openai_client, file_id):
    made = [
        openai_client.fine_tuning.jobs.create(model="tiny", training_file=file_id, metadata={"n": str(n % 2)} if n else None)
        for n in range(5)
    ]
    assert [job.id for job in openai_client.fine_tuning.jobs.list(limit=2)] == [job.id for job in reversed(made)]
    assert {job.id for job in openai_client.fine_tuning.jobs.list(metadata={"n": "1"})} == {made[1].id, made[3].id}
    bare = openai_client.fine_tuning.jobs.list(extra_query={"metadata": "null"})
    assert [job.id for job in bare] == [made[0].id]


def test_a_whole_job_as_the_client_sees_it(openai_client, file_id, user):
    job = openai_client.fine_tuning.jobs.create(model="tiny", training_file=file_id, suffix="x")
    held = take(key_of(job))
    kept = saved(30, best=True).model_copy(update={"metrics": {"loss": 1.0, "token_accuracy": 0.5}})
    with transaction() as session:
        lifecycle.record(session, held, 0, [STARTED, *[step(n) for n in range(1, 31)], events.Evaluated(step=30, loss=1.25), kept])
    running = openai_client.fine_tuning.jobs.retrieve(job.id)
    assert running.status == "running" and running.estimated_finish >= time.time() - 5 and running.progress["step"] == 30
    said = list(openai_client.fine_tuning.jobs.list_events(job.id, limit=7))
    assert len(said) == 35 and said[-1].message.startswith("Created fine-tuning job: ftjob-")
    metrics = next(e for e in said if e.type == "metrics" and e.data.get("train_loss"))
    assert metrics.message == "Step 30/20: training loss=0.06667" and metrics.data["step"] == 30
    (checkpoint,) = openai_client.fine_tuning.jobs.checkpoints.list(job.id)
    assert checkpoint.step_number == 30 and checkpoint.fine_tuned_model_checkpoint.endswith(":ckpt-step-30")
    assert checkpoint.metrics.to_dict() == {
        "step": 30, "train_loss": pytest.approx(2 / 30), "train_mean_token_accuracy": None, "valid_loss": 1.0,
        "valid_mean_token_accuracy": 0.5, "full_valid_loss": 1.0, "full_valid_mean_token_accuracy": 0.5,
    }  # fmt: skip
    assert checkpoint.scores == {"loss": 1.0, "token_accuracy": 0.5} and checkpoint.best is True
    with transaction() as session:
        lifecycle.finish(session, held, FINISHED)
    done = openai_client.fine_tuning.jobs.retrieve(job.id)
    assert done.status == "succeeded" and done.fine_tuned_model.startswith("ft:tiny:") and done.finished_at and done.trained_tokens == 777
    assert done.measured["peak_memory_bytes"] == 1
    assert openai_client.files.content(done.result_files[0]).text.startswith("step,epoch,train_loss")
    assert "successfully completed" in openai_client.fine_tuning.jobs.list_events(job.id, limit=1).data[0].message


def test_pause_resume_cancel_without_a_body(openai_client, file_id):
    job = openai_client.fine_tuning.jobs.create(model="tiny", training_file=file_id)
    assert openai_client.fine_tuning.jobs.pause(job.id).status == "paused"
    assert openai_client.fine_tuning.jobs.resume(job.id).status == "queued"
    assert openai_client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    for ask in (openai_client.fine_tuning.jobs.resume, openai_client.fine_tuning.jobs.cancel):
        with pytest.raises(openai.ConflictError) as caught:
            ask(job.id)
        assert caught.value.code == "wrong_state" and caught.value.response.headers["x-should-retry"] == "false"


PAIRS = [
    ("What wood is the belly made of?", "Spruce.", "That is a very good question about a very old instrument."),
    ("Which glue should I use?", "Hide glue, because it can be opened again.", "One, two, three, four."),
    ("How long does varnish dry?", "Two days in summer.", "Yes. No. Thank you. Yes. No."),
    ("What is carved last?", "The scroll.", "You may tap the plate and listen, or you may not."),
]


@pytest.fixture
def pairs_id(openai_client, user):
    """A file in OpenAI's preference format, uploaded with the client and read."""
    lines = [
        {
            "input": {"messages": [{"role": "user", "content": f"{n}. {prompt}"}], "tools": []},
            "preferred_output": [{"role": "assistant", "content": better}],
            "non_preferred_output": [{"role": "assistant", "content": worse}],
        }
        for n in range(10)
        for prompt, better, worse in PAIRS
    ]
    uploaded = openai_client.files.create(file=("pairs.jsonl", "\n".join(map(json.dumps, lines)).encode()), purpose="fine-tune")
    with transaction() as session:
        dataset = datasets.for_file(session, user, ids.parse(ids.FILE, uploaded.id))
    ingest_task.read(dataset.id)
    return uploaded.id


@pytest.mark.long
def test_the_method_dpo_tunes_on_preferences(openai_client, tiny_registered, pairs_id, data_dir):
    method = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.3, "n_epochs": 4, "batch_size": 4}}}
    run = {"learning_rate": 1e-2, "samples": 1, "sample_tokens": 4}
    job = openai_client.fine_tuning.jobs.create(model="tiny", training_file=pairs_id, method=method, seed=3, extra_body={"run": run})
    assert job.method.type == "dpo" and job.method.dpo.hyperparameters.beta == 0.3 and job.method.dpo.hyperparameters.n_epochs == 4
    assert job.task == "preference" and job.preference["beta"] == 0.3 and job.run["epochs"] == 4
    assert job.estimate["tokens"] > 0

    from worker.train import train

    held = take(key_of(job))
    said = list(train(JobSpec.model_validate(held.spec), data_dir / "runs" / job.id / "a1"))
    with transaction() as session:
        lifecycle.record(session, held, 0, said[:-1])
    with transaction() as session:
        lifecycle.finish(session, held, said[-1])
    done = openai_client.fine_tuning.jobs.retrieve(job.id)
    assert done.status == "succeeded" and done.fine_tuned_model.startswith("ft:tiny:")
    assert done.evaluation["tuned"]["reward_accuracy"] > 0.9
    metrics = [e.data for e in openai_client.fine_tuning.jobs.list_events(job.id, limit=100) if e.type == "metrics"]
    margins = {data["step"]: data["metrics"]["reward_margin"] for data in metrics if data["event"] == "step"}
    assert margins[max(margins)] > margins[1] + 0.1
    last = next(iter(openai_client.fine_tuning.jobs.checkpoints.list(job.id)))
    assert last.scores["reward_margin"] > 0.1
    header = openai_client.files.content(done.result_files[0]).text.splitlines()[0]
    assert "train_reward_margin" in header and "valid_reward_accuracy" in header


def test_preferences_are_learnt_without_being_asked_for_by_name(openai_client, tiny_registered, pairs_id):
    job = openai_client.fine_tuning.jobs.create(model="tiny", training_file=pairs_id)
    assert job.task == "preference" and job.method.type == "dpo" and job.preference["beta"] == 0.1
    ours = openai_client.fine_tuning.jobs.create(
        model="tiny", training_file=pairs_id, extra_body={"preference": {"loss": "ipo", "beta": 0.5}}
    )
    assert (ours.preference["loss"], ours.preference["beta"]) == ("ipo", 0.5)
    method = {"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 2}}}
    simpo = openai_client.fine_tuning.jobs.create(
        model="tiny", training_file=pairs_id, method=method, extra_body={"preference": {"loss": "simpo", "gamma": 0.4}}
    )
    assert (simpo.preference["loss"], simpo.preference["beta"], simpo.preference["gamma"]) == ("simpo", 2.0, 0.4)
    same = openai_client.fine_tuning.jobs.create(model="tiny", training_file=pairs_id, method=method)
    assert same.run == simpo.run and simpo.estimate["seconds"] < same.estimate["seconds"], "the base is not read"


@pytest.mark.parametrize(
    ("ask", "param", "says"),
    [
        ({"method": {"type": "supervised"}}, "method.type", "pairs"),
        ({"extra_body": {"task": "generation"}}, "task", "cannot be used for generation"),
        ({"extra_body": {"strategy": {"name": "feature_extraction"}}}, "strategy", "does not support the task preference"),
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": -1}}}}, "hyperparameters.beta", "beta cannot be -1"),
        ({"extra_body": {"preference": {"beta": 0}}}, "preference.beta", "beta cannot be 0"),
        ({"extra_body": {"preference": {"delta": 1}}}, "preference.delta", "no setting"),
        ({"extra_body": {"preference": {"gamma": 1}}}, "preference.gamma", "gamma means nothing with the loss dpo"),
        ({"extra_body": {"preference": {"loss": "ipo", "label_smoothing": 0.2}}}, "preference.label_smoothing", "with the loss ipo"),
        ({"extra_body": {"preference": {"loss": "orpo", "length_normalised": True}}}, "preference.length_normalised", "orpo takes beta"),
        ({"extra_body": {"preference": {"loss": "simpo", "nll_weight": 1}}}, "preference.nll_weight", "simpo takes beta, loss, gamma"),
        ({"extra_body": {"preference": {"loss": "robust_dpo", "label_smoothing": 0}}}, "preference.label_smoothing", "fraction above 0"),
        ({"extra_body": {"preference": {"loss": "ppo"}}}, "preference.loss", "preference.loss cannot be 'ppo'"),
        ({"method": {"type": "reinforcement"}}, "task", "cannot be used for reinforcement"),
    ],
)
def test_what_preferences_cannot_be_combined_with(openai_client, tiny_registered, pairs_id, ask, param, says):
    with pytest.raises(openai.BadRequestError) as caught:
        openai_client.fine_tuning.jobs.create(model="tiny", training_file=pairs_id, **ask)
    assert caught.value.param == param and says in caught.value.message


def test_settings_for_pairs_need_pairs(openai_client, file_id):
    with pytest.raises(openai.BadRequestError) as caught:
        openai_client.fine_tuning.jobs.create(model="tiny", training_file=file_id, extra_body={"preference": {"beta": 0.2}})
    assert caught.value.param == "preference" and "generation" in caught.value.message


def test_errors_have_openais_shape(openai_client, file_id):
    with pytest.raises(openai.NotFoundError) as caught:
        openai_client.fine_tuning.jobs.retrieve("missing")
    assert caught.value.body == {
        "message": "No such fine-tuning job: missing. Look it up in its list: it may have been deleted.", "type": "invalid_request_error", "param": "fine_tuning_job_id", "code": "resource_missing",
    }  # fmt: skip
    assert caught.value.response.headers["x-request-id"]
    with pytest.raises(openai.BadRequestError) as caught:
        openai_client.fine_tuning.jobs.create(model="tiny", training_file=file_id, extra_body={"strategy": {"name": "lora", "rank": 0}})
    assert caught.value.param == "strategy.rank" and "strategy.rank cannot be 0. It should be at least 1." in caught.value.message
    for body, says in ((b"[]", "The body: It should be a JSON object, as {"), (b"", "The body is empty. Send a JSON object.")):
        answer = httpx.post(
            f"{openai_client.base_url}fine_tuning/jobs",
            content=body,
            headers={"authorization": f"Bearer {openai_client.api_key}"} | {"content-type": "application/json"},
        )
        assert answer.status_code == 400 and answer.json()["error"]["message"].startswith(says)
    with pytest.raises(openai.BadRequestError) as caught:
        wish = {"type": "wandb", "wandb": {"project": "p"}}
        openai_client.fine_tuning.jobs.create(model="tiny", training_file=file_id, integrations=[wish])
    assert caught.value.param == "integrations" and "LUTHIER_WANDB" in caught.value.message
    dpo = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.1}}}
    with pytest.raises(openai.BadRequestError) as caught:
        openai_client.fine_tuning.jobs.create(model="tiny", training_file=file_id, method=dpo)
    assert "preference" in caught.value.message
    for ask in (openai_client.fine_tuning.jobs.list_events, openai_client.fine_tuning.jobs.checkpoints.list):
        with pytest.raises(openai.NotFoundError):
            list(ask("ftjob-missing"))
    with pytest.raises(openai.APIStatusError) as caught:
        list(openai_client.fine_tuning.jobs.list(after="ftjob-" + "0" * 32))
    assert caught.value.status_code in (400, 404) and caught.value.response.json()["error"]["param"] == "after"


def test_an_idempotency_key_is_honoured(openai_client, file_id):
    def submit(seed):
        return openai_client.fine_tuning.jobs.create(model="tiny", training_file=file_id, seed=seed, extra_headers={"Idempotency-Key": "k"})

    assert submit(1).id == submit(1).id
    with pytest.raises(openai.ConflictError):
        submit(2)


def test_checkpoint_permissions(openai_client, file_id, data_dir):
    from app.kit import manifest

    job = openai_client.fine_tuning.jobs.create(model="tiny", training_file=file_id)
    held = take(key_of(job))
    folder = data_dir / "runs/x/a1/checkpoint-3"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    manifest.write(folder)
    with transaction() as session:
        lifecycle.record(session, held, 0, [STARTED, step(3), saved(3)])
        lifecycle.finish(session, held, FINISHED)
    name = openai_client.fine_tuning.jobs.retrieve(job.id).fine_tuned_model
    checkpoint = f"{name}:ckpt-step-3"
    with transaction() as session:
        ada = User(name="Ada", role="member")
        session.add(ada)
        session.flush()
        team = projects.create(session, ada, "Violins")
        session.query(Checkpoint).update({"path": "runs/x/a1/checkpoint-3", "manifest_sha256": manifest.sha256_of(folder / manifest.NAME)})
        theirs = [ids.public(ids.PROJECT, key) for key in (ada.id, team.id)]
    permissions = openai_client.fine_tuning.checkpoints.permissions
    listed = getattr(permissions, "list", None) or permissions.retrieve  # its name in version 1

    def speaks(asked: str) -> bool:
        """Whether the other project may generate text with it; it never sees anything else of it."""
        with transaction() as session:
            other = session.get_one(User, ada.id).work_in(team.id)
            for look in (models.get, models.resolve):
                with pytest.raises(NotFound):
                    look(session, other, asked)
            try:
                return playground.speaker(session, other, asked).ref.name == asked
            except NotFound:
                return False

    for asked in (name, checkpoint):
        assert not speaks(asked)
        made = permissions.create(asked, project_ids=theirs)
        assert {p.project_id for p in made} == set(theirs) and speaks(asked)
        found = listed(asked)
        assert len(found.data) == 2
        mine = next(one for one in found.data if one.project_id == theirs[1])
        assert permissions.delete(mine.id, fine_tuned_model_checkpoint=asked).deleted
        assert len(listed(asked).data) == 1 and not speaks(asked)
    for wrong in ("p1", ids.public(ids.PROJECT, uuid.uuid4())):
        with pytest.raises(openai.NotFoundError, match="No such project"):
            permissions.create(name, project_ids=[wrong])


@pytest.mark.long
def test_strategies_and_estimates(server, file_id):
    with httpx.Client(base_url=server[0], headers={"authorization": f"Bearer {server[1]}"}) as web:
        listed = web.get("/v1/strategies").json()["data"]
        assert {"lora", "full"} <= {s["name"] for s in listed}
        lora = next(s for s in listed if s["name"] == "lora")
        assert lora["schema"]["properties"]["rank"]["minimum"] == 1 and lora["available"] and lora["reason"] is None
        found = web.post("/v1/estimates", json={"model": "tiny", "training_file": file_id}).json()
        assert set(found) >= {"memory_bytes", "memory", "seconds", "trainable_parameters", "fits"}
        assert web.post("/v1/estimates", json={"model": "tiny"}).json()["error"]["param"] == "training_file"
        assert web.post("/v1/estimates", content=b"{", headers={"content-type": "application/json"}).status_code == 400


# Watching -----------------------------------------------------------------------------------------------------------


class Reader(threading.Thread):
    """Reads one stream until it has heard `wanted` events or is told to leave."""

    def __init__(self, server, job_id: str, wanted: int, **headers: str) -> None:
        super().__init__(daemon=True)
        self.url, self.headers = f"{server[0]}/v1/fine_tuning/jobs/{job_id}/stream", {"authorization": f"Bearer {server[1]}"} | headers
        self.wanted, self.heard, self.times, self.open = wanted, [], [], threading.Event()
        self.start()

    def run(self) -> None:
        with contextlib.suppress(httpx.RemoteProtocolError), httpx.stream("GET", self.url, headers=self.headers, timeout=20) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream"), answer.read()
            self.open.set()
            for line in answer.iter_lines():
                if line.startswith("data:"):
                    self.heard.append(json.loads(line[5:]))
                    self.times.append(time.time())
                    if len(self.heard) >= self.wanted:
                        return


def record(job, held, first, *said):
    with transaction() as session:
        lifecycle.record(session, held, first, list(said))


def test_watchers_hear_everything_once_in_order_and_from_where_they_left(server, openai_client, file_id):
    job = openai_client.fine_tuning.jobs.create(model="tiny", training_file=file_id)
    held = take(key_of(job))
    readers = [Reader(server, job.id, 22) for _ in range(20)]
    assert all(r.open.wait(10) for r in readers)
    for n in range(1, 21):
        record(job, held, n, step(n))
    [r.join(15) for r in readers]
    for r in readers:
        assert [e["type"] for e in r.heard] == ["queued", "claimed", *["step"] * 20]
        assert [e["id"] for e in r.heard] == sorted({e["id"] for e in r.heard})
    again = Reader(server, job.id, 5, **{"last-event-id": str(readers[0].heard[-6]["id"])})
    again.join(10)
    assert [e["id"] for e in again.heard] == [e["id"] for e in readers[0].heard[-5:]]


def test_more_history_than_the_ring_holds_comes_from_postgres(server, openai_client, file_id, monkeypatch):
    from app.web import event_stream

    monkeypatch.setattr(event_stream, "RING", 50)
    monkeypatch.setattr(event_stream, "PAGE", 40)
    job = openai_client.fine_tuning.jobs.create(model="tiny", training_file=file_id)
    held = take(key_of(job))
    record(job, held, 0, *[step(n) for n in range(1, 301)])
    reader = Reader(server, job.id, 303)
    assert reader.open.wait(5)
    record(job, held, 300, step(301))
    reader.join(15)
    assert [e["step"] for e in reader.heard if e["type"] == "step"] == list(range(1, 302))


@pytest.mark.long
def test_without_redis_watchers_still_hear(server, openai_client, file_id, monkeypatch):
    monkeypatch.setattr(queue, "notify", lambda *_: None)
    job = openai_client.fine_tuning.jobs.create(model="tiny", training_file=file_id)
    held = take(key_of(job))
    reader = Reader(server, job.id, 3)
    assert reader.open.wait(5)
    time.sleep(0.3)
    record(job, held, 0, step(1))
    reader.join(10)
    assert len(reader.heard) == 3


def test_a_stream_holds_no_connection_to_the_database(server, openai_client, file_id):
    from app.db import get_engine

    job = openai_client.fine_tuning.jobs.create(model="tiny", training_file=file_id)
    readers = [Reader(server, job.id, 99) for _ in range(40)]
    assert all(r.open.wait(15) for r in readers)
    time.sleep(0.5)
    assert get_engine().pool.checkedout() <= 1


def test_another_persons_stream_is_not_there(server, openai_client, file_id, session):
    other = User(name="other")
    session.add(other)
    session.flush()
    _, key = auth.create_key(session, other, "k")
    session.commit()
    job = openai_client.fine_tuning.jobs.create(model="tiny", training_file=file_id)
    answer = httpx.get(f"{server[0]}/v1/fine_tuning/jobs/{job.id}/stream", headers={"authorization": f"Bearer {key}"})
    assert answer.status_code == 404
    assert jobs.list_(session, other) == []
