"""Two machines without a common folder: a data folder each, one database, one S3 server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid

import pytest
from sqlalchemy import select, update

from app import events, leases
from app.db import transaction
from app.jobs import artifacts, checkpoints, lifecycle, stored_checkpoints
from app.models import integrity
from app.storage import objects, places, sweeping
from app.tables import Checkpoint, Event, Job, Model
from tests.conftest import PROJECT, forget_settings, wait_until
from tests.factories import make_dataset, make_job
from tests.s3 import own_storage, running_server  # noqa: F401  # fixtures
from tests.warm import warm_attempts  # noqa: F401  # a fixture
from worker.supervision import job_turn, storing

RUN = {
    "epochs": 10,
    "max_tokens_per_step": 128,
    "evaluations_per_epoch": 2,
    "samples": 0,
    "early_stopping_patience": 0,
    "forgetting": False,
}
SUPERVISE = "import sys, uuid; from worker.supervision import job_turn, train_attempt; job_turn.work(uuid.UUID(sys.argv[1]))"


@pytest.fixture
def at(session, user, data_dir, tmp_path, monkeypatch, s3):
    """Become the machine of this name; the first is the one with the test's data folder."""
    monkeypatch.setenv("LUTHIER_STORAGE_URL", s3[1])
    for name, value in (("LEASE", "3"), ("BEAT", "0.2"), ("STOP_GRACE", "5")):
        monkeypatch.setenv(f"LUTHIER_{name}_SECONDS", value)

    def become(name):
        folder = data_dir if name == "one" else tmp_path / name
        folder.mkdir(exist_ok=True)
        monkeypatch.setenv("LUTHIER_DATA_DIR", str(folder))
        forget_settings()
        return folder

    become("one")
    return become


@pytest.fixture
def new_job(at, session, user, data_dir, tiny_registered):
    dataset = make_dataset(session, user, data_dir)
    for place in (dataset.rows_path, tiny_registered.path):
        places.push(place)
    return lambda **run: make_job(session, user, tiny_registered, dataset, **(RUN | run))


def said(job, kind):
    with transaction() as session:
        return [row.data for row in session.scalars(select(Event).where(Event.job_id == job.id, Event.type == kind).order_by(Event.id))]


def now_of(job):
    with transaction() as session:
        return session.get_one(Job, job.id)


def result_of(job):
    with transaction() as session:
        return session.scalars(select(Model).where(Model.job_id == job.id)).one()


def stored_of(job):
    """Steps of the checkpoints in the storage. Half a second passes, since whoever asks all the time takes the trainer's core."""
    time.sleep(0.5)
    return {int(name.rpartition("-")[2]) for name in places.stored(f"runs/{job.id}", "a1/checkpoint-*")}


@pytest.mark.long
@pytest.mark.usefixtures("warm_attempts")
def test_a_job_of_a_machine_that_is_lost_is_finished_on_another_with_equal_weights(at, new_job, s3):
    calm, job = new_job(), new_job()
    two = at("two")
    job_turn.work(calm.id)
    one = at("one")
    supervisor = subprocess.Popen([sys.executable, "-c", SUPERVISE, str(job.id)], cwd=PROJECT, start_new_session=True)
    try:
        wait_until(lambda: stored_of(job), what="a stored checkpoint", seconds=150)
        s3[0].kill()  # what is sent when the machine dies is not there whole
        time.sleep(0.2)
        s3[0].start()
    finally:
        os.killpg(supervisor.pid, signal.SIGKILL)
        supervisor.wait(10)
    assert now_of(job).status == "running", "it ended before the machine was lost"
    with transaction() as session:
        session.execute(update(Job).where(Job.id == job.id).values(lease_until=leases.OVER))
        leases.reap(session, lifecycle.WORK)
    at("two")
    stored = stored_of(job)
    job_turn.work(job.id)
    row = now_of(job)
    assert row.status == "succeeded" and row.attempt == 2, (row.status, row.error)
    assert said(job, "started")[-1]["resumed_from"] == max(stored) > 0
    first, second = result_of(calm), result_of(job)
    assert first.adapter_sha256 == second.adapter_sha256
    assert (two / second.path).is_dir() and not (one / second.path).exists()
    at("one")
    integrity.check(second.path, second.name, second.revision)
    assert (one / second.path / "adapter_model.safetensors").is_file(), "the first machine brings the result"
    with transaction() as session:
        assert any("step" in line or line for line in artifacts.output(session.get_one(Job, job.id)))
        for checkpoint in session.scalars(select(Checkpoint).where(Checkpoint.job_id == job.id, Checkpoint.deleted_at.is_(None))):
            assert checkpoints.folder_of(checkpoint).is_dir()
    assert sweeping.live(session, [second.path]) == {second.path}
    assert not list((two / "tmp").glob("store-*")), "no links are left"


@pytest.mark.long
@pytest.mark.usefixtures("warm_attempts")
def test_a_storage_that_is_away_delays_a_job_and_harms_nothing(at, new_job, s3, monkeypatch):
    import threading

    monkeypatch.setattr(objects, "RETRY_SECONDS", 0.3)
    monkeypatch.setattr(storing, "AGAIN_SECONDS", 0.3)
    job = new_job(epochs=2)
    at("two")
    s3[0].kill()
    thread = threading.Thread(target=job_turn.work, args=(job.id,), daemon=True)
    thread.start()
    wait_until(lambda: any("object storage" in line["message"] for line in said(job, "log")), what="a word of it", seconds=20)
    assert now_of(job).status == "running" and now_of(job).lease_until is not None
    s3[0].start()
    wait_until(lambda: said(job, "saved"), what="a checkpoint", seconds=60)
    s3[0].kill()
    wait_until(lambda: said(job, "evaluated") and len(said(job, "log")) > 1, what="another word", seconds=60)
    time.sleep(4)  # longer than a lease
    assert now_of(job).status == "running" and now_of(job).attempt == 1, "it has trained, and waits to be stored"
    s3[0].start()
    thread.join(60)
    assert now_of(job).status == "succeeded" and places.exists(result_of(job).path)


def checkpoint(session, job, held, step, best=False):
    path = f"{held.folder}/checkpoint-{step}"
    saved = events.Saved(step=step, path=path, bytes=1, manifest_sha256="", metrics={}, best=best)
    lifecycle.record(session, held, step, [saved])
    return saved


def test_no_checkpoint_goes_before_a_newer_one_is_stored(at, new_job, session):
    job = new_job()
    held = lifecycle.claim(session, job.id, "a test")
    for step in (10, 20, 30, 40, 50):
        checkpoint(session, job, held, step, best=step == 10)
    session.commit()

    def left():
        return [int(path.rpartition("-")[2]) for path in stored_checkpoints.newest_first(session, job.id)]

    def swept(stored, waiting=(), left_out=()):
        gone = stored_checkpoints.sweep(session, held, stored, waiting, left_out, keep=2)
        session.commit()
        return sorted(int(path.rpartition("-")[2]) for path in gone)

    assert swept(10) == [] and left() == [50, 40, 30, 20, 10]
    assert swept(30, waiting=[50], left_out=[20, 40]) == [20], "no machine but one has it"
    assert swept(50, waiting=[], left_out=[20, 40]) == [40]
    assert left() == [50, 30, 10], "the best stays"
    with transaction() as other:
        other.execute(update(Job).where(Job.id == job.id).values(fence=Job.fence + 1))
    session.expire_all()
    assert swept(50, left_out=[30]) == [], "of a worker that was taken for dead"


def test_checkpoints_that_come_faster_than_they_are_sent_are_left_out_and_the_best_is_not(at, new_job, session, monkeypatch, data_dir):
    import threading

    job = new_job()
    held = lifecycle.claim(session, job.id, "a test")
    session.commit()
    go, sent = threading.Event(), []
    monkeypatch.setattr(
        storing.places, "push", lambda place, source, beat: (go.wait(10), sent.append((place, (source / "file").read_text())))
    )
    store = storing.CheckpointStore(held, print)
    for step in (10, 20, 30, 40):
        folder = data_dir / held.folder / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "file").write_text(str(step))
        with transaction() as other:
            store.saved(checkpoint(other, job, held, step, best=step == 20))
        if step == 10:
            wait_until(lambda: store._storing == 10, what="the first one being sent")
    for path in (data_dir / held.folder).glob("checkpoint-*/file"):
        path.unlink()  # the trainer sweeps its own
    go.set()
    store.finish(None, lambda: None)
    assert [int(path.rpartition("-")[2]) for path, _ in sent[:3]] == [10, 20, 40] and [text for _, text in sent[:3]] == ["10", "20", "40"]
    assert not list((data_dir / "tmp").glob("store-*"))
    odd = data_dir / held.folder / "checkpoint-50"
    odd.mkdir()
    (odd / "file").symlink_to("/etc/passwd")
    told = []
    store = storing.CheckpointStore(held, told.append)
    store.saved(events.Saved(step=50, path=f"{held.folder}/checkpoint-50", bytes=1, manifest_sha256="", metrics={}, best=False))
    assert "checkpoint-50/file is no plain file" in told[0] and not store._waiting
    store.end()


def test_an_attempt_begins_with_the_newest_checkpoint_that_is_whole(at, new_job, session):
    from app.kit import manifest

    job = new_job()
    held = lifecycle.claim(session, job.id, "a test")
    one = at("one")
    for step in (10, 20, 30):
        folder = one / held.folder / f"checkpoint-{step}"
        (folder / "trainer").mkdir(parents=True)
        (folder / "trainer" / "state.json").write_text(json.dumps({"best_path": f"{held.folder}/checkpoint-10"}))
        (folder / "weights").write_text(str(step))
        manifest.write(folder)
        checkpoint(session, job, held, step, best=step == 10)
    session.commit()
    for step in (10, 20):
        places.push(f"{held.folder}/checkpoint-{step}")
    two = at("two")
    brought = storing.bring(held, lambda: None, print)
    assert brought[-2:] == [f"{held.folder}/checkpoint-20", f"{held.folder}/checkpoint-10"], "the newest was never stored"
    assert brought[:2] == [held.spec.model.path, held.spec.dataset.path]
    assert all((two / path).exists() for path in brought)
    key = uuid.uuid4()
    assert places.path(f"models/{key}") == two / "models" / str(key)
