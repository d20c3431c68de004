"""What waits for a train worker, in the order of `app.jobs.fair_share`: jobs, and evaluations, which the same workers run.

A message of the queue only says that there is work; a worker that is free takes what is next then. An evaluation takes part as a job of
its person would, of normal priority, and is charged like any other use. Evaluate workers take evaluations alone, in the same order, beside
what trains; one that has no room there waits for its turn among the jobs.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Container, Hashable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, NamedTuple

from sqlalchemy import Float, Select, case, cast, exists, func, literal, select
from sqlalchemy.orm import Session

from app import leases, limits
from app.evaluation import service as evaluations
from app.inference import residency
from app.jobs import fair_share, lifecycle, usage
from app.jobs.fair_share import Running, Situation, Waiting
from app.kit import once
from app.machines import heartbeats
from app.settings import get_settings
from app.tables import JSON, Evaluation, Job, MachineUse, Outbox, Project

UNKNOWN_SECONDS = 600.0
"""A job's time where there is no estimate."""
EVALUATION_SECONDS = 120.0

WORK: dict[str, leases.Work[Any]] = {"jobs": lifecycle.WORK, "evaluations": evaluations.WORK}
"""Every kind of work of the train workers, by its table."""
NO_ROOM = "What trains now leaves too little memory for it."


class Place(NamedTuple):
    """Where something stands in the queue. `begins` is None where no worker is online, or a limit keeps it from running at all."""

    position: int
    begins: datetime | None
    waits_for: str | None = None
    """What keeps it waiting now, in words: a limit of running jobs, or memory."""

    def seconds_left(self) -> float | None:
        """Seconds until it begins."""
        return None if self.begins is None else (self.begins - datetime.now(UTC)).total_seconds()


def situation(session: Session, at: float | None = None) -> Situation:
    """What waits, what runs and what was used, at this moment or at a time of a simulation."""
    clock = at if at is not None else session.scalar(select(leases.now())).timestamp()  # type: ignore[union-attr]
    waiting = [Waiting(*row) for kind in WORK for row in session.execute(_waiting(kind))]
    running = [_running(kind, clock, *row) for kind in WORK for row in session.execute(_held(kind))]
    used = usage.recent(session, clock)
    return Situation(clock, waiting, running, used, limits.running_limits(session, "person"), limits.running_limits(session, "project"))


def _seconds_of(kind: str) -> Any:
    """The time that a row of this kind will take, from its estimate and the steps that are done."""
    if kind == "evaluations":
        return literal(EVALUATION_SECONDS)
    estimate = func.coalesce(cast(Job.estimate["seconds"].astext, Float), UNKNOWN_SECONDS)
    done = case((Job.total_steps > 0, func.least(1.0, cast(Job.step, Float) / Job.total_steps)), else_=0.0)
    return estimate * (1.0 - done)


def _waiting(kind: str) -> Select[Any]:
    work = WORK[kind]
    table = work.table
    is_job = table is Job
    since = func.coalesce(Job.resumed_at, Job.created_at) if is_job else Evaluation.created_at
    interrupted = exists().where(MachineUse.row_id == table.id, MachineUse.started_at > since)
    query = select(
        table.id, literal(kind), table.owner_id, table.project_id, cast(func.extract("epoch", since), Float), _seconds_of(kind),
        Project.weight, Job.priority if is_job else literal("normal"), interrupted,
        func.coalesce(Job.spec["run"]["device"].astext, "auto") if is_job else literal("auto"),
    )  # fmt: skip
    return query.join(Project, Project.id == table.project_id).where(work.free())


def _held(kind: str) -> Select[Any]:
    work = WORK[kind]
    table = work.table
    left = func.coalesce(Job.seconds_left, _seconds_of(kind)) if table is Job else literal(EVALUATION_SECONDS)
    return select(table.owner_id, table.project_id, left, Project.weight).join(Project, Project.id == table.project_id).where(work.taken())


def _running(kind: str, clock: float, person: Hashable, project: Hashable, left: float, weight: float) -> Running:
    return Running(person, project, clock + left, left, weight, kind)


# The worker's part --------------------------------------------------------------------------------------------------------


def next_one(
    session: Session, tried: set[uuid.UUID], *, gpu: bool, kinds: Container[str] = tuple(WORK), at: float | None = None
) -> Waiting | None:
    """What a worker of these kinds that is free takes now: not what it has `tried` in vain, and only what trains on the CPU where no GPU
    is free."""
    now = situation(session, at)
    return fair_share.next_one(replace(now, waiting=fair_share.without(now.waiting, tried, kinds, gpu=gpu)))


def message_of(session: Session, key: uuid.UUID) -> dict[str, Any] | None:
    """The request that this row comes from, as its first message carried it."""
    said = select(Outbox.context).where(Outbox.key == key, Outbox.context.is_not(None)).order_by(Outbox.id).limit(1)
    return session.scalar(said)


SLOW_SECONDS, SHARE = 0.3, 20
"""Places that took longer than this to compute are shown for so many times as long."""


class _Last(NamedTuple):
    database: str | None
    good_until: float
    places: dict[uuid.UUID, Place]


_last = _Last(None, 0.0, {})


# What people see ------------------------------------------------------------------------------------------------------------


def places(session: Session) -> dict[uuid.UUID, Place]:
    """The place of everything that waits, by its id."""
    return once.of("the train queue", lambda: _recent_places(session))


def place_json(session: Session, one: Job | Evaluation) -> JSON:
    """The place of a job or an evaluation as the API says it; all null once it waits no more."""
    place = places(session).get(one.id) if one.status == "queued" else None
    return {
        "position": place.position if place else None,
        "expected_start": int(place.begins.timestamp()) if place and place.begins else None,
        "waits_for": place.waits_for if place else None,
    }


def evaluation_json(session: Session, evaluation: Evaluation) -> JSON:
    """An evaluation as the API returns it, with its place in the queue."""
    return evaluations.to_json(evaluation) | place_json(session, evaluation)


def _recent_places(session: Session) -> dict[uuid.UUID, Place]:
    """Computed anew each time, unless that is slow: those of thousands of jobs are shown for a while."""
    global _last
    database, now = get_settings().database_url, time.monotonic()
    if _last.database == database and now < _last.good_until:
        return _last.places
    found = _places(session)
    took = time.monotonic() - now
    _last = _Last(database, now + took * SHARE if took > SLOW_SECONDS else now, found)
    return found


def _places(session: Session) -> dict[uuid.UUID, Place]:
    at = situation(session)
    alive = heartbeats.alive()
    trainers = {worker.name for worker in alive if worker.queue == "train"}
    found: dict[uuid.UUID, Place] = {}
    for position, (one, begins) in enumerate(fair_share.order(at, max(len(trainers), 1)), 1):
        found[one.key] = Place(position, datetime.fromtimestamp(begins, UTC) if trainers else None, _waits_for(at, one))
    for one in sorted(at.waiting, key=Waiting.arrival):
        found.setdefault(one.key, Place(len(found) + 1, None, _waits_for(at, one)))
    if beside := len({worker.name for worker in alive if worker.queue == "evaluate"} - trainers):
        _place_beside_training(at, beside, found)
    return found


def _place_beside_training(at: Situation, workers: int, found: dict[uuid.UUID, Place]) -> None:
    """Set the places of evaluations that so many evaluate workers take sooner than a train worker would; those without room beside
    what trains say so."""
    waiting = [one for one in at.waiting if one.kind == "evaluations"]
    passed_over = residency.without_room(one.key for one in waiting)
    for key in passed_over:
        found[key] = found[key]._replace(waits_for=found[key].waits_for or NO_ROOM)
    alone = replace(at, waiting=[one for one in waiting if one.key not in passed_over])
    free = max(0, workers - sum(running.kind == "evaluations" for running in at.running))
    for position, (one, begins) in enumerate(fair_share.order(alone, len(at.running) + free), 1):
        sooner, before = datetime.fromtimestamp(begins, UTC), found[one.key]
        if before.begins is None or sooner < before.begins:
            found[one.key] = Place(position, sooner, before.waits_for)


def _waits_for(at: Situation, one: Waiting) -> str | None:
    for whose, most, count in (
        ("its owner", at.people_limits.get(one.person), sum(r.person == one.person for r in at.running)),
        ("its project", at.project_limits.get(one.project), sum(r.project == one.project for r in at.running)),
    ):
        if most is not None and count >= most:
            return f"The limit of {whose} is reached: {count} running, {most} allowed."
    return None
