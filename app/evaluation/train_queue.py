"""What waits for a train worker, in the order of `app.jobs.fair_share`: jobs, and evaluations, which the same workers run.

A message of the queue only says that there is work; a worker that is free takes what is next then and fits its machine
(`app.evaluation.claims`). An evaluation takes part as a job of
its person would, of normal priority, and is charged like any other use. Evaluate workers take evaluations alone, in the same order, beside
what trains; one that has no room there waits for its turn among the jobs.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, NamedTuple

from sqlalchemy import BigInteger, ColumnElement, Float, Select, and_, case, cast, exists, func, literal, null, select
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session

from app import languages, leases, limits
from app.evaluation import service as evaluations
from app.inference import residency
from app.jobs import fair_share, lifecycle, usage
from app.jobs.fair_share import Running, Situation, Waiting
from app.kit import once
from app.languages import gettext, mark
from app.machines import heartbeats, placement
from app.machines.placement import Needs
from app.settings import get_settings
from app.tables import JSON, Evaluation, Job, MachineUse, Outbox, Project

UNKNOWN_SECONDS = 600.0
"""A job's time where there is no estimate."""
EVALUATION_SECONDS = 120.0

WORK: dict[str, leases.Work[Any]] = {"jobs": lifecycle.WORK, "evaluations": evaluations.WORK}
"""Every kind of work of the train workers, by its table."""
NO_ROOM = mark("What trains now leaves too little memory for it.")


class Place(NamedTuple):
    """Where something stands in the queue. `begins` is None where no worker is online, or a limit keeps it from running at all."""

    position: int
    begins: datetime | None
    waits_for: str | None = None
    """What keeps it waiting now, in words: a limit of running jobs, memory, or a machine that there is not."""
    nowhere: bool = False
    """No train worker that is online could ever take it."""

    def seconds_left(self) -> float | None:
        """Seconds until it begins."""
        return None if self.begins is None else (self.begins - datetime.now(UTC)).total_seconds()


def situation(session: Session, at: float | None = None, *, waiting: bool = True) -> Situation:
    """What waits (unless that is not asked for), what runs and what was used, at this moment or at a time of a simulation."""
    clock = at if at is not None else session.scalar(select(leases.now())).timestamp()  # type: ignore[union-attr]
    waits = list(_all_waiting(session)) if waiting else []
    running = [_running(kind, clock, *row) for kind in WORK for row in session.execute(_held(kind))]
    one_lane = waiting and len({one.lane for one in waits}) < 2  # then nothing of what was used decides
    used = {} if one_lane else usage.recent(session, clock)
    return Situation(clock, waits, running, used, limits.running_limits(session, "person"), limits.running_limits(session, "project"))


def seconds_of(kind: str) -> Any:
    """The time that a row of this kind will take, from its estimate and the steps that are done."""
    if kind == "evaluations":
        return literal(EVALUATION_SECONDS)
    estimate = func.coalesce(Job.estimated_seconds, UNKNOWN_SECONDS)
    done = case((Job.total_steps > 0, func.least(1.0, cast(Job.step, Float) / Job.total_steps)), else_=0.0)
    return estimate * (1.0 - done)


def since_of(kind: str) -> Any:
    """When a row of this kind was queued, last."""
    return func.coalesce(Job.resumed_at, Job.created_at) if kind == "jobs" else Evaluation.created_at


def interrupted(kind: str) -> ColumnElement[bool]:
    """Whether it was claimed since, so that it must have lost its worker: nobody stopped it."""
    table = WORK[kind].table
    return and_(table.fence > 0, exists().where(MachineUse.row_id == table.id, MachineUse.started_at > since_of(kind)))


def needs_of(kind: str) -> tuple[Any, ...]:
    """The columns of `Needs`, in its order; an evaluation takes one GPU, or the CPU."""
    if kind == "evaluations":
        return literal(0, BigInteger), literal(0, BigInteger), literal(1, BigInteger), null(), literal([], JSONB)
    gpu_bytes = case((Job.device == "cpu", null()), else_=Job.gpu_bytes)
    cpu_bytes = case((Job.device == "cuda", null()), else_=Job.cpu_bytes)
    return gpu_bytes, cpu_bytes, Job.num_gpus, Job.gpu_type, Job.labels


def _all_waiting(session: Session) -> Iterator[Waiting]:
    for kind, work in WORK.items():
        table = work.table
        query = select(
            table.id, literal(kind), table.owner_id, table.project_id, cast(func.extract("epoch", since_of(kind)), Float), seconds_of(kind),
            Project.weight, Job.priority if kind == "jobs" else literal("normal"), interrupted(kind), *needs_of(kind),
        )  # fmt: skip
        for row in session.execute(query.join(Project, Project.id == table.project_id).where(work.free())):
            fields: Sequence[Any] = tuple(row)
            *needs, labels = fields[9:]
            yield replace(Waiting(*fields[:9]), needs=replace(Needs(*needs), labels=tuple(labels)))


def _held(kind: str) -> Select[Any]:
    work = WORK[kind]
    table = work.table
    left: Any = literal(EVALUATION_SECONDS)
    gpus: Any = literal(1)
    if table is Job:
        left, gpus = func.coalesce(Job.seconds_left, seconds_of(kind)), func.coalesce(Job.num_gpus, 1)
    query = select(table.owner_id, table.project_id, left, gpus, Project.weight)
    return query.join(Project, Project.id == table.project_id).where(work.taken())


def _running(kind: str, clock: float, person: Hashable, project: Hashable, left: float, gpus: int, weight: float) -> Running:
    return Running(person, project, clock + left, left * gpus, weight, kind)


# The worker's part --------------------------------------------------------------------------------------------------------


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
    language: str = languages.SOURCE  # of the words of its places


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
    database, language, now = get_settings().database_url, languages.current.get(), time.monotonic()
    if (_last.database, _last.language) == (database, language) and now < _last.good_until:
        return _last.places
    found = _places(session)
    took = time.monotonic() - now
    _last = _Last(database, now + took * SHARE if took > SLOW_SECONDS else now, found, language)
    return found


def _places(session: Session) -> dict[uuid.UUID, Place]:
    at = situation(session)
    alive = heartbeats.alive()
    trainers = {worker.name for worker in alive if worker.queue == "train"}
    found: dict[uuid.UUID, Place] = {}
    nowhere, kept, away = _nowhere(at) if trainers else {}, _kept_for(session), heartbeats.launcher_words()
    for position, (one, begins) in enumerate(fair_share.order(at, max(len(trainers), 1), lambda one: one.key not in nowhere), 1):
        found[one.key] = Place(
            position, datetime.fromtimestamp(begins, UTC) if trainers else None, kept.get(one.key) or _waits_for(at, one) or away
        )
    for one in sorted(at.waiting, key=Waiting.arrival):
        why = nowhere.get(one.key)
        found.setdefault(one.key, Place(len(found) + 1, None, why or _waits_for(at, one), nowhere=why is not None))
    if beside := len({worker.name for worker in alive if worker.queue == "evaluate"} - trainers):
        _place_beside_training(at, beside, found)
    return found


def _nowhere(at: Situation) -> dict[uuid.UUID, str]:
    """Why no train worker that is online could ever take it, of everything of which this is so."""
    known = heartbeats.capacities()
    why = {needs: placement.why_nowhere(needs, known) for needs in {one.needs for one in at.waiting}}
    return {one.key: said for one in at.waiting if (said := why[one.needs]) is not None}


def _kept_for(session: Session) -> dict[uuid.UUID, str]:
    """The jobs for which a machine keeps GPUs, in words."""
    kept = select(Job.id, Job.reserved_by).where(Job.reserved_until > leases.now(), Job.status == "queued")
    return {
        key: gettext("Its turn has come: %(machine)s keeps every suitable GPU that gets free for it.", machine=host)
        for key, host in session.execute(kept)
    }


def _place_beside_training(at: Situation, workers: int, found: dict[uuid.UUID, Place]) -> None:
    """Set the places of evaluations that so many evaluate workers take sooner than a train worker would; those without room beside
    what trains say so."""
    waiting = [one for one in at.waiting if one.kind == "evaluations"]
    passed_over = residency.without_room(one.key for one in waiting)
    for key in passed_over:
        found[key] = found[key]._replace(waits_for=found[key].waits_for or gettext(NO_ROOM))
    alone = replace(at, waiting=[one for one in waiting if one.key not in passed_over])
    free = max(0, workers - sum(running.kind == "evaluations" for running in at.running))
    for position, (one, begins) in enumerate(fair_share.order(alone, len(at.running) + free), 1):
        sooner, before = datetime.fromtimestamp(begins, UTC), found[one.key]
        if before.begins is None or sooner < before.begins:
            found[one.key] = Place(position, sooner, before.waits_for)


def _waits_for(at: Situation, one: Waiting) -> str | None:
    most, count = at.people_limits.get(one.person), sum(r.person == one.person for r in at.running)
    if most is not None and count >= most:
        return gettext("The limit of its owner is reached: %(count)s running, %(most)s allowed.", count=count, most=most)
    most, count = at.project_limits.get(one.project), sum(r.project == one.project for r in at.running)
    if most is not None and count >= most:
        return gettext("The limit of its project is reached: %(count)s running, %(most)s allowed.", count=count, most=most)
    return None
