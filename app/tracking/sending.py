"""Sends what a job's events say and a tracker has not got yet: a task of the data workers."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session

from app import leases
from app.db import transaction
from app.errors import StudioError
from app.events import from_row
from app.kit import ids
from app.settings import get_settings
from app.spec import JobSpec
from app.tables import JSON, Event, Job, TrackedRun
from app.trackers import TRACKERS, Point, TrackedJob, Tracker, Value, figures
from app.tracking import service as tracking

log = logging.getLogger(__name__)

EVENTS_AT_ONCE = 5000
"""Of one sending; the rest follows in the next one."""


class Part(NamedTuple):
    """What is to be sent of a job: its points, the event up to which that is everything, and the last step of each kind of event then."""

    job: TrackedJob
    points: list[Point]
    last_event_id: int
    sent_steps: JSON
    more: bool


class LeaseGone(Exception):
    """Another worker holds the row."""


def send(key: uuid.UUID) -> None:
    """Send what is due of one job to one tracker, and record what came of it."""
    with transaction() as session:
        row = leases.claim(session, tracking.WORK, key)
        if row is None:
            return
        tracker = TRACKERS[row.kind].model_validate(row.wish)
        part = read(session, row)
        if _nothing_new(row, tracker, part):
            tracking.put_off(session, row, row.last_event_id if tracker.waits_for_end() else part.last_event_id)
            return
    held = leases.Beat(tracking.WORK, row.id, row.fence)

    def beat() -> None:
        if not held():
            raise LeaseGone

    try:
        state = tracker.send(part.job, part.points, row.state, beat)
    except LeaseGone:
        log.info("%s of job %s is sent by another worker", row.kind, row.job_id)
        return
    except (StudioError, OSError, ImportError) as fault:
        with transaction() as session:
            tracking.refused(session, row, str(fault)[:500])
        return
    with transaction() as session:
        tracking.sent(session, row, part.last_event_id, part.sent_steps, state, 0 if part.more else tracker.pause_seconds)


def _nothing_new(row: TrackedRun, tracker: Tracker, part: Part) -> bool:
    """Whether the job has not begun, has neither new figures nor another status, or is to be sent once it has ended."""
    if tracker.waits_for_end() and not (part.job.ended or part.more):
        return True
    return not part.points and row.state.get("status", "running" if part.job.started_at == 0 else "") == part.job.status


def read(session: Session, row: TrackedRun) -> Part:
    """What is new of a job, by its stored events."""
    job = session.get_one(Job, row.job_id)
    query = select(Event).where(Event.job_id == job.id, Event.id > row.last_event_id).order_by(Event.id).limit(EVENTS_AT_ONCE)
    rows = session.scalars(query).all()
    more = len(rows) == EVENTS_AT_ONCE
    ended = job.status not in tracking.UNENDED and not more
    points, last_event_id = new_points(rows, row.sent_steps, row.last_event_id, hold=not ended)
    sent_steps = dict(row.sent_steps)
    for point in points:
        sent_steps[point.kind] = max(point.step, sent_steps.get(point.kind, -1))
    return Part(_told(job, ended), points, last_event_id, sent_steps, more)


def new_points(rows: Sequence[Event], sent_steps: JSON, before: int, *, hold: bool) -> tuple[list[Point], int]:
    """The points of these events in the order of their steps, and the event up to which they are everything. An attempt that goes on from a
    checkpoint repeats the steps after it: the first word counts, so that what is sent twice, because nobody recorded it, is the same.

    With `hold` the newest step is left for the next time, as more may be said of it.
    """
    found: dict[tuple[int, str], Point] = {}
    first: dict[int, int] = {}
    for row in rows:
        event = from_row(row.type, row.data)
        values, step = figures(event), getattr(event, "step", None)
        if values and step is not None and step > sent_steps.get(row.type, -1):
            found.setdefault((step, row.type), Point(row.type, step, row.created_at.timestamp(), values))
            first.setdefault(step, row.id)
    last = rows[-1].id if rows else before
    if hold and first:
        newest = max(first)
        last = first[newest] - 1
        found = {key: point for key, point in found.items() if key[0] != newest}
    return [found[key] for key in sorted(found)], last


def _told(job: Job, ended: bool) -> TrackedJob:
    public_id = ids.public(ids.JOB, job.id)
    return TrackedJob(
        key=job.id,
        public_id=public_id,
        name=job.name,
        url=f"{get_settings().address}/jobs/{public_id}",
        folder=get_settings().data_dir / "runs" / str(job.id),
        status=job.status if ended else "running",
        started_at=job.started_at.timestamp() if job.started_at else job.finished_at.timestamp() if ended and job.finished_at else 0,
        ended_at=job.finished_at.timestamp() if ended and job.finished_at else None,
        parameters=parameters(job),
        error=str((job.error or {}).get("message", "")),
    )


def parameters(job: Job) -> dict[str, Value]:
    """The settings of a job, flat: `run.epochs`, `strategy.rank`. What is not set is left out."""
    spec = JobSpec.model_validate(job.spec)
    told: dict[str, Any] = {
        "task": spec.task, "model": spec.model.name, "dataset": spec.dataset.name, "rows": spec.dataset.rows,
        "strategy": spec.strategy.model_dump(mode="json"), "run": spec.run.model_dump(mode="json"), "preference": job.spec.get("preference"),
    }  # fmt: skip
    told["run"]["learning_rate"] = spec.learning_rate
    return dict(_flat(told))


def _flat(value: Any, path: str = "") -> list[tuple[str, Value]]:
    if isinstance(value, dict):
        return [pair for name, inner in value.items() for pair in _flat(inner, f"{path}.{name}" if path else str(name))]
    if value is None or value == []:
        return []
    return [(path, value if isinstance(value, str | int | float | bool) else str(value))]
