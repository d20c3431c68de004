"""Ordering a job: what is refused and with which words, what is frozen, and what people may ask of it afterwards."""

from __future__ import annotations

import importlib.util
import threading
import uuid
from pathlib import Path
from typing import Any

import pytest
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import func, select, update

from app import db, queue
from app.db import transaction
from app.errors import BadField, BadRequest, Conflict, NotFound, StudioError
from app.jobs import lifecycle, metrics_csv
from app.jobs import request as job_request
from app.jobs import service as jobs
from app.jobs.request import read_order
from app.kit import ids
from app.leases import expire
from app.spec import JobSpec
from app.tables import Dataset, Event, Job, Outbox, User
from tests.factories import make_dataset
from tests.jobs.test_lifecycle import leases, let_lapse, take  # noqa: F401


@pytest.fixture
def dataset(session, user, data_dir):
    return make_dataset(session, user, data_dir)


@pytest.fixture
def order(tiny_registered, dataset):
    def make(**more: Any) -> job_request.JobRequest:
        return read_order({"model": "tiny", "training_file": ids.public(ids.FILE, dataset.file_id), **more})

    return make


def make(session, user, order, key=None) -> Job:
    job = jobs.create(session, user, order, key)
    session.commit()
    return job


def test_a_job_its_message_and_its_first_event_come_together(session, user, order):
    job = make(session, user, order(run={"epochs": 2}, strategy={"name": "lora", "rank": 4}, seed=7, metadata={"team": "a"}))
    spec = JobSpec.model_validate(job.spec)
    assert (job.status, spec.run.epochs, spec.run.seed, spec.strategy.rank, spec.task) == ("queued", 2, 7, 4, "generation")
    assert job.estimate["memory_bytes"] > 0 and job.estimate["trainable_parameters"] > 0
    assert session.scalars(select(Outbox.task).where(Outbox.key == job.id)).all() == [queue.TRAIN]
    assert [e.type for e in jobs.events(session, job)] == ["queued"]


def test_openai_settings_become_ours(session, user, order, dataset):
    hyper = {"n_epochs": 4, "batch_size": 8, "learning_rate_multiplier": 2.0}
    spec = JobSpec.model_validate(make(session, user, order(hyperparameters=hyper)).spec)
    assert spec.run.epochs == 4
    assert spec.run.learning_rate == pytest.approx(spec.strategy.default_learning_rate * 2)
    with transaction() as s:
        s.execute(update(Dataset).values(report={"characters": 4000, "tokens": 1000, "trained_tokens": 300, "longest": 40}))
    nested = {"type": "supervised", "supervised": {"hyperparameters": hyper | {"n_epochs": "auto"}}}
    session.expire_all()
    spec = JobSpec.model_validate(make(session, user, order(method=nested)).spec)
    assert spec.run.max_tokens_per_step == 8 * 25  # 40 rows of 25 tokens each
    assert spec.run.epochs == 15, "as many as it takes to sixty steps of the 30 rows that are not held out"
    spec = JobSpec.model_validate(make(session, user, order(hyperparameters=hyper, run={"epochs": 1})).spec)
    assert spec.run.epochs == 1


def test_stored_jobs_take_the_new_name_of_a_setting(session, user, order):
    """Down to the name that a batch's passes had before, and up again: the job is the same."""
    job = make(session, user, order(run={"micro_batches": 4, "epochs": 1}))
    before = dict(job.spec)
    path = Path(__file__).parents[2] / "migrations/versions/0009_micro_batches.py"
    found = importlib.util.spec_from_file_location("renames", path)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    with Operations.context(MigrationContext.configure(session.connection())):
        module.downgrade()
        session.expire_all()
        assert job.spec["run"]["accumulation"] == job.order["run"]["accumulation"] == 4 and "micro_batches" not in job.spec["run"]
        assert JobSpec.model_validate(job.spec) == JobSpec.model_validate(before)
        module.upgrade()
        session.expire_all()
    assert job.spec == before and job.order["run"] == {"micro_batches": 4, "epochs": 1}


def test_a_gpu_takes_longer_steps_where_the_data_has_enough_of_them(session, user, order, dataset, monkeypatch):
    """By the card's memory, and never so long that an epoch has hardly any steps."""
    from app.machines import hardware

    def step_tokens(gibibytes: int | None, tokens: int) -> int:
        report = {"characters": 4 * tokens, "tokens": tokens, "trained_tokens": tokens, "longest": 40}
        with transaction() as s:
            s.execute(update(Dataset).values(report=report, rows=tokens // 25, good_rows=tokens // 25))
        session.expire_all()
        here = hardware.Machine(cores=2, memory_bytes=2**34, gpu_memory_bytes=gibibytes and gibibytes * 2**30)
        monkeypatch.setattr(hardware, "this_machine", lambda: here)
        return JobSpec.model_validate(make(session, user, order()).spec).run.max_tokens_per_step

    many = 32 * 20_000
    assert [step_tokens(memory, many) for memory in (None, 8, 24, 80)] == [2048, 4096, 8192, 16_384]
    assert step_tokens(80, 32 * 5000) == 7168, "sixty steps in three epochs"
    assert step_tokens(80, 1000) == 256 and step_tokens(None, 1000) == 256, "small data has small steps"
    assert JobSpec.model_validate(make(session, user, order(run={"max_tokens_per_step": 512})).spec).run.max_tokens_per_step == 512
    for asked, tokens in (("cpu", 2048), ("cuda", 16_384)):
        step_tokens(80, many)
        assert JobSpec.model_validate(make(session, user, order(run={"device": asked})).spec).run.max_tokens_per_step == tokens


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"model": "no-such"}, "model", "no-such"),
        ({"training_file": "file-123"}, "training_file", "file-123"),
        ({"training_file": f"file-{uuid.UUID(int=5).hex}"}, "training_file", "No such file"),
        ({"training_file": None}, "training_file", "No data"),
        ({"validation_file": "file-123"}, "validation_file", "file-123"),
        ({"strategy": {"name": "lora", "rank": 0}}, "strategy.rank", "rank"),
        ({"strategy": {"name": "lora", "rnak": 8}}, "strategy.rnak", "rnak"),
        ({"strategy": {"name": "magic"}}, "strategy.name", "magic"),
        ({"run": {"epochs": -1}}, "run.epochs", "-1"),
        ({"run": {"epoch": 1}}, "run.epoch", "epoch"),
        ({"run": {"precision": "fp4"}}, "run.precision", "fp4"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", "0"),
        ({"hyperparameters": {"n_epochs": "many"}}, "hyperparameters.n_epochs", "many"),
        ({"suffix": "x" * 65}, "suffix", "64"),
        ({"seed": -1}, "seed", "-1"),
        ({"metadata": {"a": "b" * 513}}, "metadata.a", "512"),
        ({"metadata": {str(n): "x" for n in range(17)}}, "metadata", "16"),
        ({"task": "classification"}, "task", "generation"),
        ({"method": {"type": "reinforcement"}}, "method.reinforcement.grader", "needs a reward"),
        ({"method": {"type": "magic"}}, "method.type", "magic"),
        ({"model": None}, "model", "missing"),
    ],
)
def test_what_is_wrong_is_said_before_a_job_exists(session, user, order, dataset, change, param, words):
    body = {"model": "tiny", "training_file": ids.public(ids.FILE, dataset.file_id)} | change
    with pytest.raises((BadRequest, NotFound)) as caught:
        make(session, user, read_order(body))
    assert caught.value.param == param and words in str(caught.value)
    session.rollback()
    assert session.scalar(select(func.count()).select_from(Job)) == 0
    assert session.scalar(select(func.count()).select_from(Outbox).where(Outbox.task == queue.TRAIN)) == 0


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"status": "error", "error": {"message": "Line 3 is broken.", "hint": "Mend it."}}, "Line 3 is broken. Mend it."),
        ({"good_rows": 0}, "no valid row"),
        ({"task": "classification", "format": "classification"}, "classification"),
    ],
)
def test_a_dataset_that_cannot_teach_is_refused(session, user, order, dataset, state, words):
    session.execute(update(Dataset).values(**state))
    session.commit()
    with pytest.raises(BadField) as caught:
        make(session, user, order(task="generation"))
    assert words in str(caught.value)


def test_a_deleted_model_and_one_still_coming_are_refused(session, user, order, tiny_registered):
    tiny_registered.status = "fetching"
    session.commit()
    with pytest.raises(StudioError) as caught:
        make(session, user, order())
    assert caught.value.status in (400, 409) and caught.value.param == "model"
    tiny_registered.status, tiny_registered.deleted_at = "ready", tiny_registered.created_at
    session.commit()
    with pytest.raises(NotFound) as caught:
        make(session, user, order())
    assert caught.value.param == "model"


def test_another_persons_data_and_jobs_are_not_there(session, user, order):
    job = make(session, user, order())
    other = User(name="other")
    session.add(other)
    session.commit()
    with pytest.raises(NotFound):
        make(session, other, order())
    for ask in (jobs.get, jobs.cancel, jobs.pause, jobs.resume, jobs.save_now, jobs.delete):
        with pytest.raises(NotFound):
            ask(session, other, job.id)
    assert jobs.list_(session, other) == [] and jobs.list_(session, user) == [job]


def test_the_same_key_gives_the_same_job_even_at_the_same_moment(session, user, order):
    ready, made = threading.Barrier(4), []

    def submit() -> None:
        ready.wait()
        with transaction() as s:
            made.append(jobs.create(s, s.get_one(User, user.id), order(), "key-1").id)

    threads = [threading.Thread(target=submit) for _ in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert len(made) == 4 and len(set(made)) == 1
    assert session.scalar(select(func.count()).select_from(Outbox).where(Outbox.task == queue.TRAIN)) == 1
    with pytest.raises(Conflict, match="another order"):
        make(session, user, order(seed=9), "key-1")
    session.rollback()
    assert make(session, user, order(seed=9), "key-2").id != made[0]


def test_a_job_waits_for_its_dataset(session, user, order, dataset):
    session.execute(update(Dataset).values(status="reading"))
    session.commit()
    job = make(session, user, order())
    assert jobs.reading(session, job) and job.estimate is None
    assert take(job.id) is None and session.scalar(select(func.count()).select_from(Outbox).where(Outbox.task == queue.TRAIN)) == 0
    jobs.reap(session)
    session.commit()
    assert jobs.reading(session, job)
    session.execute(update(Dataset).values(status="ready"))
    session.commit()
    jobs.reap(session)
    session.commit()
    session.refresh(job)
    assert not jobs.reading(session, job) and job.estimate and JobSpec.model_validate(job.spec).dataset.rows == 40
    assert session.scalar(select(func.count()).select_from(Outbox).where(Outbox.task == queue.TRAIN)) == 1
    assert take(job.id) is not None


def test_a_job_whose_dataset_turns_out_bad_fails_with_the_reason(session, user, order, dataset):
    session.execute(update(Dataset).values(status="reading"))
    session.commit()
    job = make(session, user, order())
    session.execute(update(Dataset).values(status="error", error={"message": "Line 3 is broken.", "hint": "Mend it."}))
    session.commit()
    assert jobs.resolve_waiting_jobs(session, dataset.id) == 1
    session.commit()
    session.refresh(job)
    assert job.status == "failed" and "Line 3 is broken" in job.error["message"] and job.error["param"] == "training_file"


def test_a_waiting_job_is_paused_resumed_and_cancelled_at_once(session, user, order):
    job = make(session, user, order())
    assert jobs.pause(session, user, job.id).status == "paused"
    session.commit()
    assert take(job.id) is None
    assert jobs.pause(session, user, job.id).status == "paused"  # asking twice is no fault
    assert jobs.resume(session, user, job.id).status == "queued"
    assert jobs.cancel(session, user, job.id).status == "cancelled"
    session.commit()
    assert [e.type for e in jobs.events(session, job)] == ["queued", "stopped", "queued", "stopped"]
    for ask in (jobs.pause, jobs.resume, jobs.save_now):
        with pytest.raises(Conflict, match="cancelled"):
            ask(session, user, job.id)


def test_a_running_job_is_asked(session, user, order):
    job = make(session, user, order())
    held = take(job.id)
    assert jobs.save_now(session, user, job.id).save_requested
    assert jobs.pause(session, user, job.id).status == "running"
    session.commit()
    with transaction() as s:
        assert lifecycle.heartbeat(s, held) == lifecycle.ControlFlags(cancel=False, pause=True, save=True)
    with transaction() as s:
        lifecycle.stopped(s, held, 5)
    assert jobs.get(session, user, job.id).status == "paused"


def test_a_cancelled_job_whose_worker_died_is_cancelled(session, user, order, leases):  # noqa: F811
    job = make(session, user, order())
    take(job.id)
    jobs.cancel(session, user, job.id)
    session.commit()
    let_lapse(job.id)
    with transaction() as s:
        expire(s, lifecycle.WORK)
    assert jobs.get(session, user, job.id).status == "cancelled"


def test_delete_waits_for_the_end_and_takes_the_files(session, user, order, data_dir):
    job = make(session, user, order())
    folder = data_dir / "runs" / str(job.id) / "a1"
    folder.mkdir(parents=True)
    with pytest.raises(Conflict):
        jobs.delete(session, user, job.id)
    with transaction() as s:
        jobs.cancel(s, user, job.id)
        jobs.delete(s, user, job.id)
    assert not folder.exists()
    with pytest.raises(NotFound):
        jobs.get(session, user, job.id)


def test_a_change_wakes_the_watchers_after_it_is_in(session, user, order):
    heard = queue.get_redis().pubsub()
    heard.psubscribe(f"{queue.PREFIX}job:*")
    heard.get_message(timeout=1)
    with transaction() as s:
        job = jobs.create(s, s.get_one(User, user.id), order())
        s.flush()
        assert heard.get_message(timeout=0.2) is None  # not before
    message = heard.get_message(timeout=2)
    assert message["channel"].decode() == queue.channel("job", job.id)


def test_redis_being_away_stops_nobody(session, user, order, monkeypatch):
    from app.settings import get_settings

    monkeypatch.setattr(get_settings(), "redis_url", "unix:///nowhere/at/all.sock")
    with transaction() as s:
        job = jobs.create(s, s.get_one(User, user.id), order())
    assert jobs.get(session, user, job.id).status == "queued"
    assert db.get_engine().pool.checkedout() <= 1


def test_metrics_file_counts_a_repeated_step_once():
    from tests.jobs.test_lifecycle import STARTED, step

    def row(event):
        return Event(type=event.type, data=event.model_dump(mode="json", exclude={"type"}))

    again = STARTED.model_copy(update={"resumed_from": 2})
    text = metrics_csv.results_csv(
        [row(e) for e in (STARTED, step(1), step(2), step(3), step(4), again, step(3).model_copy(update={"loss": 9.0}))]
    )
    lines = text.decode().splitlines()
    assert [line.split(",")[0] for line in lines] == ["step", "1", "2", "3"] and lines[3].split(",")[2] == "9.0"
