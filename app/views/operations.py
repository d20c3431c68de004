"""What an admin watches: queues, leases, running jobs, devices, recent errors. The page Admin and `/metrics` read the same."""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Any, NamedTuple

import redis
from sqlalchemy import desc, func, literal, select, union_all
from sqlalchemy.orm import Session

from app.datasets import inspections, token_counts
from app.datasets.ingest_task import WORK as READS
from app.evaluation import service as evaluations
from app.jobs import lifecycle
from app.kit import ids
from app.languages import gettext, mark, ngettext
from app.leases import Work, now
from app.machines import heartbeats
from app.models import exports, imports
from app.prompts import runs
from app.queue import PREFIX, ROUTES, get_redis
from app.settings import get_settings
from app.tables import Dataset, Evaluation, Event, Export, Job, Model

WORK: dict[str, Work[Any]] = {
    "job": lifecycle.WORK,
    "evaluation": evaluations.WORK,
    "prediction": evaluations.PREDICTIONS,
    "prompt_run": runs.WORK,
    "dataset": READS,
    "token_count": token_counts.WORK,
    "inspection": inspections.WORK,
    "import": imports.FETCHES,
    "examination": imports.EXAMINATIONS,
    "export": exports.WORK,
}
"""Every kind of work that workers claim, by the name its numbers have."""
RECENT_ERRORS = 20


class QueueState(NamedTuple):
    """One kind of work: what waits for a worker, what is held, and how old the oldest of each is."""

    name: str
    queue: str
    waiting: int
    wait_seconds: float
    held: int
    lease_age_seconds: float
    """Since the last heartbeat of the quietest holder."""


def waiting(session: Session) -> list[QueueState]:
    """All kinds of work, by one query."""
    parts = []
    for name, work in WORK.items():
        parts += [
            select(literal(name), literal("free"), func.count(), func.min(work.since)).where(work.free()),
            select(literal(name), literal("held"), func.count(), func.min(work.table.lease_until)).where(work.taken()),
        ]
    clock: datetime = session.scalar(select(now()))  # type: ignore[assignment]
    found = {(name, how): (count, oldest) for name, how, count, oldest in session.execute(union_all(*parts))}
    told = []
    for name, work in WORK.items():
        (free, since), (held, until) = found[name, "free"], found[name, "held"]
        age = get_settings().lease_seconds - (until - clock).total_seconds() if until else 0.0
        wait = (clock - since).total_seconds() if since else 0.0
        told.append(QueueState(name, ROUTES[work.task] if work.task else "web", free, max(0.0, wait), held, max(0.0, age)))
    return told


def messages() -> dict[str, int]:
    """Messages in each queue of the broker; empty when it does not answer."""
    try:
        wire = get_redis()
        return {queue: int(wire.llen(f"{PREFIX}{queue}")) for queue in sorted(set(ROUTES.values()))}
    except (redis.RedisError, RuntimeError):
        return {}


class RunningJob(NamedTuple):
    """A job that trains, by its newest step."""

    id: str
    name: str
    step: int
    total_steps: int | None
    step_seconds: float | None
    tokens_per_second: float | None
    memory_bytes: int | None
    worker: str | None


def running(session: Session, at_most: int = 50) -> list[RunningJob]:
    """Jobs that hold a lease, oldest first."""
    jobs = session.scalars(select(Job).where(lifecycle.WORK.taken()).order_by(Job.started_at).limit(at_most)).all()
    told = []
    for job in jobs:
        last, before = (*_steps(session, job.id), None, None)[:2]
        seconds = last["seconds"] - before["seconds"] if last and before and last["step"] == before["step"] + 1 else None
        facts = last or {}
        told.append(
            RunningJob(
                ids.public(ids.JOB, job.id), job.name, job.step, job.total_steps, seconds if seconds and seconds > 0 else None,
                facts.get("tokens_per_second"), facts.get("memory_bytes"), job.worker,
            )
        )  # fmt: skip
    return told


def _steps(session: Session, job_id: uuid.UUID) -> list[dict[str, Any]]:
    """The newest two steps."""
    query = select(Event.data).where(Event.job_id == job_id, Event.type == "step").order_by(Event.id.desc()).limit(2)
    return list(session.scalars(query))


class Failure(NamedTuple):
    """Something that ended with an error."""

    kind: str
    id: str
    name: str
    message: str
    hint: str
    at: datetime
    path: str


def recent_errors(session: Session) -> list[Failure]:
    """The newest errors of jobs, evaluations, exports, datasets and models that were not deleted."""
    found = []
    for kind, table, prefix, path in (
        (mark("Run"), Job, ids.JOB, "/jobs/{}"),
        (mark("Evaluation"), Evaluation, ids.EVALUATION, "/evaluations/{}"),
        (mark("Export"), Export, ids.EXPORT, ""),
        (mark("Dataset"), Dataset, ids.DATASET, "/datasets/{}"),
        (mark("Model"), Model, ids.MODEL, "/models/{}"),
    ):
        when = func.coalesce(table.finished_at, table.created_at) if hasattr(table, "finished_at") else table.created_at
        query = select(table, when).where(table.error.is_not(None), table.deleted_at.is_(None), table.status.in_(("failed", "error")))
        for row, at in session.execute(query.order_by(desc(when)).limit(RECENT_ERRORS)):
            key, error = ids.public(prefix, row.id), row.error or {}
            name = str(getattr(row, "name", None) or getattr(row, "format", None) or getattr(row, "kind", ""))
            found.append(Failure(gettext(kind), key, name, error.get("message", ""), error.get("hint") or "", at, path.format(key)))
    return sorted(found, key=lambda one: one.at, reverse=True)[:RECENT_ERRORS]


class MachineDevice(NamedTuple):
    """A machine that trains, as its workers describe it."""

    host: str
    gpu: str | None
    cores: int
    memory_bytes: int
    silent_seconds: float

    @property
    def label(self) -> str:
        """By which `/metrics` tells devices apart, in English."""
        return f"GPU {self.gpu}" if self.gpu else f"CPU, {self.cores} cores"

    @property
    def title(self) -> str:
        return self.label if self.gpu else ngettext("CPU, %(num)s cores", "CPU, %(num)s cores", self.cores)


def devices() -> list[MachineDevice]:
    """Machines whose train worker was heard of in the last half minute."""
    return [
        MachineDevice(host, machine.gpu_name, machine.cores, machine.training_memory_bytes, silent)
        for host, silent, machine in heartbeats.machines()
        if silent < heartbeats.FADES_SECONDS
    ]
