"""The relay sends every committed order at least once, is woken at once, and outlives its servers."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid

import kombu.pools
import pytest
import redis
from kombu.exceptions import OperationalError as BrokerError
from sqlalchemy import func, select, text, update

from app import queue
from app.datasets import ingest_task
from app.datasets import service as datasets
from app.db import transaction
from app.evaluation import service as evaluations
from app.jobs import lifecycle
from app.kit import ids
from app.models import imports as model_imports
from app.prompts import runs as prompt_runs
from app.prompts import service as prompts
from app.relay import database_is_settled, reap, relay, send_batch, take_over
from app.settings import PROJECT, get_settings
from app.storage import files
from app.tables import Evaluation, Event, Job, Outbox, PromptRun
from tests.conftest import wait_until
from tests.factories import make_dataset, make_job


def order(count: int = 1, task: str = queue.TRAIN) -> list[uuid.UUID]:
    keys = [uuid.uuid4() for _ in range(count)]
    with transaction() as session:
        for key in keys:
            queue.enqueue(session, task, key)
    return keys


def arrived(name: str) -> list[str]:
    """The first argument of every message that waits in a queue, oldest first, without taking it."""
    messages = queue.get_redis().lrange(f"{queue.PREFIX}{name}", 0, -1)
    return [json.loads(base64.b64decode(json.loads(message)["body"]))[0][0] for message in reversed(messages)]


def unsent() -> int:
    with transaction() as session:
        return len(session.scalars(select(Outbox).where(Outbox.sent_at.is_(None))).all())


def test_messages_go_to_their_queues_in_order_and_only_once(session):
    trains, reads = order(3), order(2, queue.READ)
    with transaction() as s:
        assert send_batch(s) == 5
    with transaction() as s:
        assert send_batch(s) == 0
    assert arrived("train") == [str(key) for key in trains]
    assert arrived("data") == [str(key) for key in reads]
    assert unsent() == 0


def test_an_order_that_was_rolled_back_is_never_sent(session):
    with pytest.raises(RuntimeError), transaction() as s:
        queue.enqueue(s, queue.TRAIN, uuid.uuid4())
        s.flush()
        raise RuntimeError
    with transaction() as s:
        assert send_batch(s) == 0


@pytest.mark.long
def test_a_broker_that_is_away_leaves_every_message_where_it_was(session, monkeypatch):
    order(3)
    queue.celery.conf.broker_url = "redis://127.0.0.1:1/0"
    reset_celery()
    with pytest.raises((BrokerError, redis.RedisError, OSError)), transaction() as s:
        send_batch(s)
    assert unsent() == 3
    queue.celery.conf.broker_url = queue.broker_url(get_settings().redis_url)
    reset_celery()
    with transaction() as s:
        assert send_batch(s) == 3


def reset_celery() -> None:
    """Forget open connections, so that the next message goes to the address that is set now."""
    kombu.pools.reset()
    queue.celery._pool = None
    queue.celery.amqp._producer_pool = None


def test_two_relays_share_the_messages(session):
    """SKIP LOCKED: while one relay holds messages in its transaction, the other takes none of them."""
    order(4)
    with transaction() as first:
        assert send_batch(first) == 4
        with transaction() as second:
            assert send_batch(second) == 0


def test_a_running_relay_is_woken_well_under_a_second(session):
    stop = threading.Event()
    thread = threading.Thread(target=relay, args=(stop.is_set,))
    thread.start()
    try:
        waits = []
        for _ in range(5):
            key = str(order()[0])
            began = time.monotonic()
            wait_until(lambda key=key: key in arrived("train"), what="the message", seconds=5)
            waits.append(time.monotonic() - began)
        assert sorted(waits)[2] < 0.3, waits
    finally:
        stop.set()
        thread.join(10)


def test_the_reaper_waits_a_lease_after_the_database_restarted(session, monkeypatch):
    monkeypatch.setenv("LUTHIER_LEASE_SECONDS", "100000")
    get_settings.cache_clear()
    assert not database_is_settled(session)
    monkeypatch.setenv("LUTHIER_LEASE_SECONDS", "0.001")
    get_settings.cache_clear()
    assert database_is_settled(session)


def test_what_the_workers_of_a_dead_studio_held_goes_on_at_once(session, user, tiny_registered, tiny_model, data_dir):
    """Everything that has a lease, while no lease has passed and the database has just come up."""
    get_settings().lease_seconds = 100_000
    data = make_dataset(session, user, data_dir)
    job = make_job(session, user, tiny_registered, data)
    ordered = evaluations.read_order({"model": "tiny", "dataset_id": ids.public(ids.DATASET, data.id)})
    evaluation = evaluations.create(session, user, ordered)
    file = files.add_bytes(session, user, b'{"prompt": "a", "completion": "b"}', "x.jsonl", "fine-tune")
    reading = datasets.create(session, user, file)
    fetch = model_imports.add_folder(session, user, str(tiny_model), "another", anywhere=True)
    _, version = prompts.create(session, user, "a prompt", prompts.read_body({"max_tokens": 2}))
    run = prompt_runs.create(session, user, version, "tiny", data, prompt_runs.RunOrder())
    session.commit()
    with transaction() as s:
        held = lifecycle.claim(s, job.id, "w1")
        assert held and evaluations.claim(s, evaluation.id) and ingest_task.claim(s, reading.id) and prompt_runs.claim(s, run.id)
    assert model_imports._claim(model_imports.FETCHES, fetch.id)
    session.execute(update(Outbox).values(sent_at=func.clock_timestamp()))
    session.commit()
    with transaction() as s:
        reap(s)
    assert unsent() == 0

    with transaction() as s:
        take_over(s)
    with transaction() as s:
        ordered_again = set(s.scalars(select(Outbox.key).where(Outbox.sent_at.is_(None))))
        assert ordered_again >= {job.id, evaluation.id, reading.id, fetch.id, run.id}
        found = [s.get_one(Job, job.id), s.get_one(Evaluation, evaluation.id), s.get_one(PromptRun, run.id)]
        assert [row.status for row in found] == ["queued"] * 3
        lost = s.scalars(select(Event).where(Event.job_id == job.id, Event.type == "lost")).one()
        assert lost.data["message"] == "Worker w1 died with the studio."
        assert lifecycle.claim(s, job.id, "w2").fence == held.fence + 1 and ingest_task.claim(s, reading.id)
    assert model_imports._claim(model_imports.FETCHES, fetch.id)
    with pytest.raises(lifecycle.FenceLost), transaction() as s:
        lifecycle.heartbeat(s, held)
    with transaction() as s:
        take_over(s)
        assert s.scalar(select(Evaluation.deaths)) == 1, "what nobody held has lost nobody"


@pytest.mark.long
def test_the_process_outlives_its_database_connection_and_stops_when_told(session):
    """The real process: its connections are cut in the middle, it goes on, and SIGTERM ends it with code 0."""
    process = subprocess.Popen([sys.executable, "-m", "app.relay"], cwd=PROJECT, env=dict(os.environ), stderr=subprocess.PIPE, text=True)
    try:
        first = str(order()[0])
        wait_until(lambda: first in arrived("train"), what="the first message", seconds=30)
        session.execute(
            text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()")
        )
        session.rollback()
        second = str(order()[0])
        wait_until(lambda: second in arrived("train"), what="the second message", seconds=15)
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0, process.stderr.read()[-3000:]


def test_old_messages_are_swept(session):
    """Done in the reaper's round: messages sent over a day ago go, the others stay."""
    from app.jobs import service as jobs

    order(2)
    with transaction() as s:
        send_batch(s)
        oldest = s.scalars(select(Outbox.id).order_by(Outbox.id)).first()
        s.execute(update(Outbox).where(Outbox.id == oldest).values(sent_at=text("clock_timestamp() - interval '25 hours'")))
    with transaction() as s:
        jobs.reap(s)
    assert len(session.scalars(select(Outbox)).all()) == 1
