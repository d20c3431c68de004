"""A disk that is really full: what is said, what is kept, and that all goes on once there is room."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from sqlalchemy import select, text, update

from app import db, queue
from app.datasets import ingest_task
from app.datasets import service as datasets
from app.errors import DiskFull
from app.jobs import lifecycle
from app.jobs import service as jobs
from app.kit import ids
from app.leases import OVER
from app.machines import heartbeats
from app.models import exports, starters
from app.settings import PROJECT, get_settings
from app.storage import files
from app.tables import Dataset, Event, Job, Model
from app.web import auth
from app.web.error_responses import fault_of
from tests import lives
from tests.conftest import forget_settings, wait_until
from tests.datasets.test_service import rows
from tests.factories import chat_rows, make_dataset, make_job
from tests.warm import warm_attempts  # noqa: F401  # a fixture


@dataclass
class SmallDisk:
    """The data folder as a disk of its own, which can be filled to the last byte."""

    folder: Path

    def fill(self) -> None:
        with contextlib.suppress(OSError), (self.folder / "ballast").open("ab", buffering=0) as file:
            while True:
                file.write(b"\0" * 4096)

    def make_room(self) -> None:
        (self.folder / "ballast").unlink()


@pytest.fixture
def small_disk(data_dir: Path) -> Iterator[SmallDisk]:
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m,mode=711", "tmpfs", str(data_dir)], capture_output=True, check=False)
    if made.returncode != 0:
        pytest.skip("only root may mount a small disk")
    yield SmallDisk(data_dir)
    subprocess.run(["umount", "--lazy", str(data_dir)], check=True)


def now_of(key) -> Job:
    with db.transaction() as session:
        return session.get_one(Job, key)


# Training -------------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.usefixtures("warm_attempts")
def test_a_job_is_paused_before_its_start_and_in_the_middle_and_goes_on_when_there_is_room(small_disk, session, user, tiny_registered):
    from worker.supervision import job_turn

    dataset = make_dataset(session, user, small_disk.folder)
    run = {"max_steps": 80, "epochs": 100, "samples": 0, "forgetting": False, "evaluations_per_epoch": 0}
    job = make_job(session, user, tiny_registered, dataset, **run)
    small_disk.fill()
    job_turn.work(job.id)
    row = now_of(job.id)
    assert (row.status, row.error["code"], row.deaths) == ("paused", "disk_full", 0)
    again(small_disk, user, job)
    running = threading.Thread(target=job_turn.work, args=(job.id,), daemon=True)
    running.start()
    wait_until(lambda: now_of(job.id).step > 1, what="its steps", seconds=60)
    small_disk.fill()  # its result finds no room
    running.join(60)
    row = now_of(job.id)
    assert (row.status, row.error["code"], row.deaths) == ("paused", "disk_full", 0)
    again(small_disk, user, job)
    job_turn.work(job.id)
    assert now_of(job.id).status == "succeeded", now_of(job.id).error


def again(small_disk: SmallDisk, user, job: Job) -> None:
    small_disk.make_room()
    with db.transaction() as session:
        jobs.resume(session, user, job.id)


def test_what_a_trainer_writes_beside_its_result(small_disk, tiny_model):
    """The ledger belongs to the result, so the job pauses; what is kept for the next job alone is done without."""
    import torch

    from worker import run
    from worker.data.batching import Row, tokenise
    from worker.modeling import packed_attention
    from worker.modeling.loading import load_plain, load_tokenizer
    from worker.runtime.device import choose
    from worker.scoring import forgetting
    from worker.training import feature_cache, row_losses

    spec = order_of(tiny_model)
    tokenizer = load_tokenizer(spec.model)
    data = tokenise(tokenizer, [Row(i, row) for i, row in enumerate(chat_rows(4), start=1)], "dialogue", 64)
    feature_cache.keep("before", ["a", "b"], np.ones((2, 2), np.float32))
    small_disk.fill()
    with pytest.raises(OSError) as full:
        row_losses.write(small_disk.folder / "runs", [row_losses.LossPart(data, [1.0] * len(data), [1.0] * len(data))])
    said = run.failed(full.value, spec, 7)
    assert (said.kind, said.step) == ("disk_full", 7) and "resume" in said.hint

    feature_cache.keep("after", [str(n) for n in range(200)], np.ones((200, 200), np.float32))
    assert not feature_cache.kept("after", ["7"]) and list(feature_cache.kept("before", ["a", "c"])) == ["a"]
    assert [path.name.partition("-")[0] for path in (small_disk.folder / "features").iterdir()] == ["before"]
    network = load_plain(spec.model, torch.float32, packed_attention.NAME)
    engine = choose(spec.run, spec.strategy)
    cache = forgetting.ProbeCache(spec.model, tokenizer, engine)
    assert cache.keep(forgetting.scores(spec, network, tokenizer, 512, engine)) and cache.read() is None


def order_of(tiny_model: Path):
    from tests.worker.orders import order, put_dataset, put_model

    return order(put_model(tiny_model), put_dataset(chat_rows(8)))


def test_a_finished_job_has_its_model_though_there_is_no_room_for_its_figures(small_disk, session, user, tiny_registered):
    life = lives.Life(session, lives.order(session, user, tiny_registered)).claim().say(lives.started(), *lives.steps(1, 120))
    small_disk.fill()
    life.finish()
    row = now_of(life.job_id)
    assert (row.status, row.result_file_id) == ("succeeded", None)
    assert session.scalar(select(Model).where(Model.job_id == life.job_id)) is not None
    warned = session.scalars(select(Event).where(Event.job_id == life.job_id, Event.type == "log")).all()
    assert any("not kept as a file" in event.data["message"] and "full" in event.data["message"] for event in warned)
    with pytest.raises(lifecycle.FenceLost):  # it ended; nothing more is written
        lifecycle.record(session, life.held, life.said, [lives.finished()])


# Data -----------------------------------------------------------------------------------------------------------------


def test_a_dataset_that_met_a_full_disk_is_read_again_by_one_click(small_disk, session, user, client):
    file = files.add_bytes(session, user, rows(200).encode(), "x.jsonl", "fine-tune")
    dataset = datasets.create(session, user, file)
    session.commit()
    path = f"/datasets/{ids.public(ids.DATASET, dataset.id)}"
    assert client.post(f"{path}/retry", follow_redirects=False).status_code == 409, "it waits to be read already"
    small_disk.fill()
    ingest_task.read(dataset.id)
    session.expire_all()
    assert (dataset.status, dataset.error["code"], file.status) == ("error", "disk_full", "error")
    page = client.get(path).text
    assert "disk" in page and "Read it again" in page

    assert client.post(f"{path}/retry", follow_redirects=False).headers["location"] == path
    ingest_task.read(dataset.id)  # still no room: the same again, not a reader that is thought to have died
    session.expire_all()
    assert (dataset.status, dataset.error["code"]) == ("error", "disk_full")
    small_disk.make_room()
    client.post(f"{path}/retry")
    session.expire_all()
    assert (dataset.status, file.status) == ("reading", "uploaded")
    ingest_task.read(dataset.id)
    session.expire_all()
    assert (dataset.status, dataset.good_rows, file.status) == ("ready", 200, "processed")
    assert "Read it again" not in client.get(path).text


@pytest.mark.long
@pytest.mark.parametrize("before", [True, False], ids=["before it starts", "half-way"])
def test_an_export_that_meets_a_full_disk_leaves_nothing_and_can_be_ordered_again(
    small_disk, session, user, tiny_registered, monkeypatch, before: bool
):
    monkeypatch.setattr(exports, "SPARE_BYTES", 0)
    made = exports.create(session, user, "tiny", "gguf", ["F16", "F32"])
    session.commit()
    tmp = small_disk.folder / "tmp"
    if before:
        small_disk.fill()
    else:
        seen = starters.ask_child

        def filled(*given: Any, **more: Any) -> Any:
            """Fills the disk as soon as the first file is complete."""
            beat = given[4]

            def tell() -> None:
                if not (small_disk.folder / "ballast").exists() and any(tmp.glob("export-*/out/*-F16.gguf")):
                    small_disk.fill()
                beat()

            return seen(*given[:4], tell, *given[5:], **more)

        monkeypatch.setattr(starters, "ask_child", filled)
    exports.run(made.id)
    session.expire_all()
    assert (made.status, made.error["code"], made.files) == ("failed", "disk_full", []), made.error
    assert "filled up" in made.error["message"] and made.error["hint"]
    assert list(tmp.iterdir()) == [] and not exports.folder_of(made.id).exists()
    small_disk.make_room()
    monkeypatch.undo()
    monkeypatch.setattr(exports, "SPARE_BYTES", 0)
    again = exports.create(session, user, "tiny", "gguf", ["F16", "F32"])
    session.commit()
    exports.run(again.id)
    session.expire_all()
    assert again.id != made.id and again.status == "succeeded", again.error


def test_a_reading_that_was_ordered_again_has_three_lives_of_its_own(session, user):
    dataset = datasets.create(session, user, files.add_bytes(session, user, rows(3).encode(), "x.jsonl", "fine-tune"))
    session.commit()
    for deaths in (1, 2, 3, 1, 2, 3):
        assert ingest_task.claim(session, dataset.id) is not None
        session.execute(update(Dataset).values(lease_until=OVER))
        ingest_task.reap(session)
        session.expire_all()
        assert dataset.status == ("error" if deaths == 3 else "reading")
        if deaths == 3:
            assert dataset.error["code"] == "crashed"
            ingest_task.read_again(session, dataset)
    session.commit()


# Servers --------------------------------------------------------------------------------------------------------------


def test_a_full_disk_of_the_database_is_not_a_database_that_is_away(session):
    with pytest.raises(Exception, match="No space left") as refused:
        session.execute(
            text("DO $$ BEGIN RAISE EXCEPTION 'could not extend file: No space left on device' USING ERRCODE = '53100'; END $$")
        )
    fault = fault_of(refused.value)
    assert isinstance(fault, DiskFull) and (fault.status, fault.code) == (507, "disk_full") and "database" in fault.message


@pytest.fixture
def full_broker(small_disk, session, tiny_registered, api, monkeypatch) -> Iterator[Callable[[], None]]:
    """A real Valkey of this test's own, whose disk is full; called, it gives the broker room again."""
    from app.ops.embedded.valkey import Valkey

    (small_disk.folder / "broker").mkdir()
    server = Valkey(small_disk.folder / "broker")
    process = subprocess.Popen(server.command(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/")
    wait_until(server.socket.exists, what="Valkey")
    monkeypatch.setenv("LUTHIER_REDIS_URL", server.url)
    forget_settings()
    auth.secret()  # it lies on the disk already; this process forgot it with its settings
    queue.celery.conf.broker_url = queue.broker_url(server.url)
    small_disk.fill()
    wire = queue.get_redis()

    def refuses() -> bool:
        try:
            wire.set("x", os.urandom(8192))
        except redis.ResponseError as error:
            return str(error).startswith("MISCONF")
        return False

    wait_until(refuses, what="the refusal")
    yield small_disk.make_room
    process.kill()
    process.wait()


def test_a_broker_whose_disk_is_full_is_named_and_workers_are_seen_again_afterwards(api, full_broker, monkeypatch):
    monkeypatch.setattr(heartbeats, "REPEAT_SECONDS", 0.1)
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}
    answer = api.post("/v1/chat/completions", json=asked)
    assert answer.status_code == 507 and "broker" in answer.json()["error"]["message"], answer.text
    talking = heartbeats.keep_saying("train")
    try:
        assert not heartbeats.alive()
        full_broker()
        wait_until(lambda: [w for w in heartbeats.alive() if w.queue == "train"], what="the worker's word", seconds=30)
    finally:
        talking.set()


def test_readiness_says_what_is_wrong_with_a_broker_whose_disk_is_full(api, full_broker):
    def broker() -> dict:
        return api.get("/readyz").json()["checks"]["redis"]

    found = broker()
    assert not found["good"] and "disk is full" in found["message"] and "Make room" in found["hint"]
    full_broker()
    wait_until(lambda: broker()["good"], what="the broker", seconds=30)


@pytest.mark.long
def test_a_worker_waits_for_a_broker_whose_disk_is_full(session, full_broker, tmp_path):
    """The real process, which ended at the first refusal."""
    command = [sys.executable, "-m", "celery", "-A", "worker.main", "worker", "-Q", "data", "--pool=threads", "-c", "1"]
    with (tmp_path / "worker.log").open("wb") as log:
        worker = subprocess.Popen(
            [*command, "--without-gossip", "--without-mingle", "--without-heartbeat"], cwd=PROJECT, stdout=log, stderr=log
        )
    try:
        said = tmp_path / "worker.log"
        wait_until(lambda: "MISCONF" in said.read_text() or worker.poll() is not None, what="a refusal", log=said, seconds=60)
        with pytest.raises(subprocess.TimeoutExpired):
            worker.wait(3)
        full_broker()
        wait_until(lambda: [w for w in heartbeats.alive() if w.queue == "data"], what="the worker", log=said, seconds=60)
    finally:
        worker.terminate()
        worker.wait(30)


def test_the_page_of_a_job_says_that_nothing_can_be_recorded(small_disk, session, user, client, tiny_registered):
    life = lives.Life(session, lives.order(session, user, tiny_registered)).claim().say(lives.started(), *lives.steps(1, 5))
    address = f"/jobs/{ids.public(ids.JOB, life.job_id)}"
    assert "nothing more can be recorded" not in client.get(address).text
    small_disk.fill()
    page = client.get(address).text
    assert "nothing more can be recorded" in page and "Make room" in page


def test_every_page_of_an_error_is_readable(small_disk, client, user, session):
    small_disk.fill()
    answer = client.post("/datasets", files={"file": ("x.jsonl", rows(2000))}, headers={"accept": "text/html"}, follow_redirects=False)
    assert answer.status_code == 507 and "full" in answer.text
    assert get_settings().data_dir == small_disk.folder and not session.scalars(select(Dataset)).all()
