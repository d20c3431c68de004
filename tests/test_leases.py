"""The lease protocol, by the same tests on every table that has one."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from sqlalchemy import func, select, true, update
from sqlalchemy.orm import Session

from app import leases, queue, trackers
from app.batches import service as batches
from app.datasets import ingest_task, inspections, token_counts
from app.datasets import service as datasets
from app.db import transaction
from app.distillations import service as distillations
from app.evals import service as evals
from app.evals import sources
from app.evaluation import service as evaluations
from app.events import Queued
from app.jobs import lifecycle
from app.kit import ids
from app.leases import OVER, Work
from app.models import exports
from app.models import imports as model_imports
from app.prompts import runs as prompt_runs
from app.prompts import service as prompts
from app.settings import get_settings
from app.storage import files
from app.tables import Base, Dataset, Job, Leased, Model, Outbox, User, WebhookDelivery, WebhookEndpoint
from app.tracking import service as tracking
from app.webhooks import service as webhooks
from tests.factories import make_dataset, make_job


class World(NamedTuple):
    """What a row needs to be ordered."""

    session: Session
    user: User
    data: Dataset
    model: Model
    folder: Path


def a_job(world: World) -> Leased:
    return make_job(world.session, world.user, world.model, world.data)


def an_evaluation(world: World) -> Leased:
    asked = evaluations.read_order({"model": world.model.name, "dataset_id": ids.public(ids.DATASET, world.data.id)})
    return evaluations.create(world.session, world.user, asked)


def a_prompt_run(world: World) -> Leased:
    _, version = prompts.create(world.session, world.user, "a prompt", prompts.read_body({"max_tokens": 2}))
    return prompt_runs.create(world.session, world.user, version, world.model.name, world.data, prompt_runs.RunOrder())


def a_distillation(world: World) -> Leased:
    order = distillations.DistillationOrder(answers=1, license="MIT", allows_training=True)
    return distillations.create(world.session, world.user, world.model.name, world.data, order)


def a_fetch(world: World) -> Leased:
    return model_imports.add_folder(world.session, world.user, str(world.folder), "another", anywhere=True)


def an_examination(world: World) -> Leased:
    """Of a model that came in under earlier rules."""
    found = Model(name="old", title="x", kind="dialogue", owner_id=world.user.id, source={"from": "hub", "repo": "a/b"}, status="ready")
    world.session.add(found)
    world.session.flush()
    queue.enqueue(world.session, queue.EXAMINE, found.id)
    return found


def a_reading(world: World) -> Leased:
    file = files.add_bytes(world.session, world.user, b'{"prompt": "a", "completion": "b"}', "x.jsonl", "fine-tune")
    return datasets.create(world.session, world.user, file)


def a_count(world: World) -> Leased:
    """Of the tokens of a dataset that was read before there was a model."""
    queue.enqueue(world.session, token_counts.WORK.task, world.data.id)
    return world.data


def an_inspection(world: World) -> Leased:
    return inspections.ask(world.session, world.data, "rows", {"count": 5, "skip": 0})


def an_export(world: World) -> Leased:
    return exports.create(world.session, world.user, world.model.name, "gguf", ["F16"])


def a_batch(world: World) -> Leased:
    file = files.add_bytes(world.session, world.user, b"{}", "in.jsonl", "batch")
    order = {"input_file_id": ids.public(ids.FILE, file.id), "endpoint": "/v1/completions", "completion_window": "24h"}
    return batches.create(world.session, world.user, batches.BatchOrder.model_validate(order))


def an_eval_run(world: World) -> Leased:
    criterion = {"type": "string_check", "name": "right", "operation": "eq", "input": "{{sample.output_text}}", "reference": "{{item.a}}"}
    made = evals.create(world.session, world.user, "a", {"type": "custom", "item_schema": {"type": "object"}}, [criterion], None)
    source = {"type": "jsonl", "source": {"type": "file_content", "content": [{"item": {"a": "b"}}]}}
    return evals.create_run(world.session, world.user, made, "a", sources.read(source), None)


def a_delivery(world: World) -> Leased:
    url, kinds = "https://hooks.example.com/a", ["batch.failed"]
    endpoint = WebhookEndpoint(
        id=uuid.uuid4(), owner_id=world.user.id, project_id=world.user.project_id, name="ci", url=url, event_types=kinds
    )
    world.session.add(endpoint)
    world.session.flush()
    key = webhooks.deliver_to(world.session, endpoint, "batch.failed", "batch_1", uuid.uuid4())
    return world.session.get_one(WebhookDelivery, key)


def a_tracked_run(world: World) -> Leased:
    job = a_job(world)
    tracking.begin(world.session, job.id, [trackers.TRACKERS["tensorboard"]()])
    lifecycle.record_event(world.session, job.id, 0, Queued())
    (row,) = tracking.of_job(world.session, world.session.get_one(Job, job.id))
    return row


KINDS: dict[str, tuple[Work[Any], Callable[[World], Leased]]] = {
    "jobs": (lifecycle.WORK, a_job),
    "evaluations": (evaluations.WORK, an_evaluation),
    "prompt runs": (prompt_runs.WORK, a_prompt_run),
    "distillations": (distillations.WORK, a_distillation),
    "fetches": (model_imports.FETCHES, a_fetch),
    "examinations": (model_imports.EXAMINATIONS, an_examination),
    "readings": (ingest_task.WORK, a_reading),
    "token counts": (token_counts.WORK, a_count),
    "inspections": (inspections.WORK, an_inspection),
    "exports": (exports.WORK, an_export),
    "batches": (batches.WORK, a_batch),
    "eval runs": (evals.WORK, an_eval_run),
    "webhook deliveries": (webhooks.WORK, a_delivery),
    "tracked runs": (tracking.WORK, a_tracked_run),
}
"""Each kind of work, and how a row comes to wait for it."""
UNCAPPED: tuple[Work[Any], ...] = (model_imports.EXAMINATIONS,)
"""Tried again however many workers die of it."""


@pytest.fixture
def world(session, user, data_dir, tiny_registered, tiny_model) -> World:
    get_settings().lease_seconds = 0.2  # the database of the tests has been up for longer
    return World(session, user, make_dataset(session, user, data_dir), tiny_registered, tiny_model)


@pytest.fixture(params=KINDS)
def work(request) -> Work[Any]:
    return KINDS[request.param][0]


@pytest.fixture
def row(request, work, world, monkeypatch) -> Leased:
    """A row that waits, with its message sent, and leases that pass only when a test says so, however slow the machine."""
    monkeypatch.setattr(leases, "lease", lambda: leases.now() + timedelta(hours=1))
    made = next(make for kind, make in KINDS.values() if kind is work)(world)
    world.session.execute(update(Outbox).values(sent_at=leases.now()))
    world.session.commit()
    return made


def take(work: Work[Any], row: Leased) -> int | None:
    with transaction() as session:
        found = leases.claim(session, work, row.id)
        return None if found is None else found.fence


def set_lease(work: Work[Any], row: Leased, until: Any) -> None:
    with transaction() as session:
        session.execute(update(work.table).where(work.table.id == row.id).values(lease_until=until))


def silent(work: Work[Any], row: Leased) -> None:
    """Its holder has not been heard of for a lease."""
    set_lease(work, row, leases.now() - timedelta(seconds=1))


def now_of(work: Work[Any], row: Leased) -> Any:
    with transaction() as session:
        return session.get_one(work.table, row.id)


def messages(work: Work[Any], row: Leased) -> int:
    with transaction() as session:
        return session.scalar(select(func.count(Outbox.id)).where(Outbox.key == row.id, Outbox.task == work.task)) or 0


def forget_messages() -> None:
    """All messages were sent long ago and are lost."""
    with transaction() as session:
        session.execute(update(Outbox).values(sent_at=leases.now() - timedelta(seconds=get_settings().announce_again_seconds + 1)))


def announce(work: Work[Any], row: Leased) -> int:
    """How many messages a look for lost ones orders for this row; other rows of its table may wait too."""
    told = messages(work, row)
    with transaction() as session:
        leases.redeliver(session, work)
    return messages(work, row) - told


def expire(work: Work[Any]) -> int:
    with transaction() as session:
        return leases.expire(session, work)


def check_that_only_the_newest_claim_writes(work: Work[Any], row: Leased) -> None:
    first = take(work, row)
    assert first is not None and take(work, row) is None, "two hold it"
    silent(work, row)
    second = take(work, row)
    assert second == first + 1, "a silent holder keeps it"
    before = now_of(work, row).lease_until
    with transaction() as session:
        assert not leases.heartbeat(session, work, row.id, first), "a stale beat was taken"
        assert not leases.finish_if_held(session, work, row.id, first, status="stale"), "a stale end was taken"
        assert leases.lock_if_held(session, work, row.id, first) is None, "a stale holder got the row"
    assert not leases.Beat(work, row.id, first)()
    found = now_of(work, row)
    assert (found.lease_until, found.status) == (before, work.runs_as)
    with transaction() as session:
        assert leases.lock_if_held(session, work, row.id, second) is not None
        assert leases.heartbeat(session, work, row.id, second)
        assert leases.finish_if_held(session, work, row.id, second, status="done")
    assert (now_of(work, row).lease_until, now_of(work, row).status) == (None, "done")
    with transaction() as session:
        assert not leases.heartbeat(session, work, row.id, second), "what has ended is held still"


def test_every_table_with_a_lease_is_tested_here():
    tables = {mapper.class_ for mapper in Base.registry.mappers if "lease_until" in mapper.columns}
    assert tables == set(Leased.__subclasses__()) == {work.table for work, _ in KINDS.values()}


def test_only_the_newest_claim_writes(work, row):
    check_that_only_the_newest_claim_writes(work, row)


@pytest.mark.parametrize("broken", ["held", "free"])
def test_a_protocol_without_its_conditions_is_seen(work, row, monkeypatch, broken):
    """The test above fails when writes are not fenced, and when a claim does not ask whether somebody holds the row."""
    without = {"held": lambda self, key, fence: self.table.id == key, "free": lambda self: true()}
    monkeypatch.setattr(Work, broken, without[broken])
    with pytest.raises(AssertionError):
        check_that_only_the_newest_claim_writes(work, row)


def test_what_is_not_there_or_deleted_is_not_claimed(work, row):
    with transaction() as session:
        assert leases.claim(session, work, uuid.uuid4()) is None
    if not hasattr(work.table, "deleted_at"):
        return
    fence = take(work, row)
    with transaction() as session:
        session.execute(update(work.table).where(work.table.id == row.id).values(deleted_at=leases.now()))
    with transaction() as session:
        assert not leases.heartbeat(session, work, row.id, fence), "its holder hears that it was deleted"
    silent(work, row)
    assert expire(work) == 0 and take(work, row) is None


def test_a_dead_holder_is_counted_and_the_row_announced(work, row):
    take(work, row)
    assert expire(work) == 0, "its lease has not passed"
    told = messages(work, row)
    silent(work, row)
    assert expire(work) == 1 and expire(work) == 0
    found = now_of(work, row)
    assert (found.status, found.lease_until, messages(work, row)) == (work.waits_as, None, told + (work.task is not None))
    assert found.deaths == (0 if work in UNCAPPED else 1)
    assert take(work, row) == 2


def test_the_third_death_ends_it(work, row):
    for _ in range(leases.MAX_DEATHS):
        assert take(work, row) is not None
        silent(work, row)
        told = messages(work, row)
        assert expire(work) == 1
    found = now_of(work, row)
    assert found.lease_until is None
    if work in UNCAPPED:
        assert messages(work, row) == told + 1
    else:
        assert messages(work, row) == told and take(work, row) is None and found.deaths == leases.MAX_DEATHS


def test_a_row_given_back_has_lost_nobody(work, row):
    fence = take(work, row)
    with transaction() as session:
        assert leases.requeue(session, work, leases.lock_if_held(session, work, row.id, fence))
    assert now_of(work, row).deaths == 0 and take(work, row) == fence + 1


def test_nobody_is_dead_before_the_database_answered_for_a_lease(work, row):
    take(work, row)
    silent(work, row)
    get_settings().lease_seconds = 1e6  # as if the server had started within the last lease
    assert expire(work) == 0 and take(work, row) is None
    set_lease(work, row, OVER)  # this one is known to be dead
    assert expire(work) == 1


def test_lost_messages_are_announced_again_and_a_long_queue_is_not_flooded(work, row, monkeypatch):
    if work.task is None:
        assert announce(work, row) == 0, "who does it looks for rows, and hears no messages"
        return
    monkeypatch.setitem(queue.ROUTES, work.task, "read-by-nobody")  # a worker of other tests may read the real one
    assert announce(work, row) == 0, "its message was sent a moment ago"
    forget_messages()
    queue.get_redis().rpush(f"{queue.PREFIX}{queue.ROUTES[work.task]}", "a message")
    assert announce(work, row) == 0, "its message is most likely in the queue"
    queue.get_redis().flushdb()
    assert announce(work, row) == 1 and announce(work, row) == 0
    forget_messages()
    take(work, row)
    assert announce(work, row) == 0, "somebody is at it"


def test_a_row_that_another_transaction_holds_is_passed_over(work, row):
    forget_messages()
    with transaction() as other:
        other.execute(select(work.table).where(work.table.id == row.id).with_for_update())
        assert announce(work, row) == 0
    take(work, row)
    silent(work, row)
    with transaction() as other:
        other.execute(select(work.table).where(work.table.id == row.id).with_for_update())
        assert expire(work) == 0
    assert expire(work) == 1


def test_a_beat_is_said_at_most_once_a_second(work, row):
    beat = leases.Beat(work, row.id, take(work, row))
    silent(work, row)
    before = now_of(work, row).lease_until
    assert beat() and now_of(work, row).lease_until > before
    with transaction() as session:
        session.execute(update(work.table).values(fence=99))
    assert beat(), "it looked again at once"
    beat.last -= 2
    assert not beat()
