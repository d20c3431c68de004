"""Jobs in trackers, one row for each job and tracker, and how far its events were sent.

    queued ──claim──▶ running ──sent or refused──▶ queued, with a later `next_at`
                         └──third death──▶ failed, until a person asks again

A row is due while the job has events behind `last_event_id`. What is sent is read from the table `events`, so a tracker that is away, or was
chosen when the job had ended, gets the same as one that was there: a trainer knows of none of this. Who sends is `sending.py`.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Sequence
from datetime import timedelta

from sqlalchemy import and_, exists, func, literal, select
from sqlalchemy.dialects.postgresql import JSONB, insert
from sqlalchemy.orm import Session

from app import leases, queue, trackers
from app.errors import BadField, Conflict
from app.languages import gettext
from app.settings import get_settings
from app.tables import JSON, Event, Job, TrackedRun
from app.trackers import SentState, Tracker

log = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 5, 3600
"""Before the second try, and at most; each pause is four times as long as the one before. There is no last try."""
IDLE_SECONDS = 60.0
"""Until a job without news is looked at again."""
UNENDED = ("queued", "running", "paused")


# Which jobs are in which trackers -----------------------------------------------------------------------------------------


def begin(session: Session, job_id: uuid.UUID, chosen: Sequence[Tracker]) -> None:
    """Have a new job sent to these trackers, and to those that every job is sent to."""
    wanted = {one.kind: one for one in [*trackers.named(get_settings().trackers), *chosen]}
    _follow(session, job_id, list(wanted.values()))


def add(session: Session, job: Job, chosen: Sequence[Tracker]) -> list[TrackedRun]:
    """Have a job sent to these trackers, from its first event on, or try now where it is sent there. Raises Conflict for other settings
    than those it is sent with."""
    _follow(session, job.id, chosen)
    found = {row.kind: row for row in of_job(session, job)}
    for one in chosen:
        row = found[one.kind]
        if row.wish != _wish(one):
            message = gettext("The job is in %(tracker)s already, with other settings.", tracker=one.title)
            raise Conflict(message, hint=gettext("Send those it has, or none."), param="integrations")
        if row.status == "failed" or row.error:
            row.status, row.error, row.deaths, row.next_at = "queued", None, 0, leases.now()
            queue.enqueue(session, queue.TRACK, row.id)
    session.flush()
    return [found[one.kind] for one in chosen]


def _follow(session: Session, job_id: uuid.UUID, chosen: Sequence[Tracker]) -> None:
    rows = [{"id": uuid.uuid4(), "job_id": job_id, "kind": one.kind, "wish": _wish(one)} for one in chosen]
    if rows:
        made = insert(TrackedRun).values(rows).on_conflict_do_nothing(index_elements=["job_id", "kind"])
        for key in session.scalars(made.returning(TrackedRun.id)).all():
            queue.enqueue(session, queue.TRACK, key)


def _wish(tracker: Tracker) -> JSON:
    return tracker.model_dump(mode="json", exclude_none=True, exclude_defaults=True)


def of_job(session: Session, job: Job) -> list[TrackedRun]:
    query = select(TrackedRun).where(TrackedRun.job_id == job.id).order_by(TrackedRun.kind)
    return list(session.scalars(query.execution_options(populate_existing=True)))


def possible(session: Session, job: Job) -> list[type[Tracker]]:
    """Trackers that this job could be sent to besides."""
    there = {row.kind for row in of_job(session, job)}
    return [cls for kind, cls in trackers.TRACKERS.items() if kind not in there and _is_set_up(cls)]


def _is_set_up(cls: type[Tracker]) -> bool:
    try:
        cls().check()
    except BadField:
        return False
    return True


def to_json(row: TrackedRun) -> JSON:
    return {
        "object": "fine_tuning.job.tracker",
        "type": row.kind,
        row.kind: row.wish,
        "status": "failed" if row.status == "failed" else "retrying" if row.error else "following",
        "url": row.state.get("url") or None,
        "folder": row.state.get("folder"),
        "error": row.error,
        "sent_at": int(row.sent_at.timestamp()) if row.sent_at else None,
        "created_at": int(row.created_at.timestamp()),
    }


# Who sends ----------------------------------------------------------------------------------------------------------------


def _died(session: Session, row: TrackedRun, how: str) -> None:
    if not leases.requeue(session, WORK, row, died=True):
        row.status, row.error = "failed", f"Its worker {how} That was death {row.deaths}."


WORK = leases.Work(
    TrackedRun, queue.TRACK, waits_as="queued", runs_as="running", since=TrackedRun.next_at, on_death=_died,
    due=and_(
        TrackedRun.next_at <= leases.now(),
        exists().where(Event.job_id == TrackedRun.job_id, Event.id > TrackedRun.last_event_id),
        exists().where(Job.id == TrackedRun.job_id, Job.deleted_at.is_(None)),
    ),
)  # fmt: skip


def sent(session: Session, row: TrackedRun, last_event_id: int, sent_steps: JSON, state: SentState, pause_seconds: float) -> bool:
    """Record how far a job was sent. False where another worker holds it meanwhile."""
    return leases.finish_if_held(
        session, WORK, row.id, row.fence, status="queued", last_event_id=last_event_id, sent_steps=sent_steps, state=state, tries=0, deaths=0,
        error=None, sent_at=leases.now(), next_at=leases.now() + timedelta(seconds=pause_seconds),
    )  # fmt: skip


def put_off(session: Session, row: TrackedRun, last_event_id: int) -> None:
    """There was nothing to send yet."""
    later = leases.now() + timedelta(seconds=IDLE_SECONDS if last_event_id == row.last_event_id else 0)
    leases.finish_if_held(session, WORK, row.id, row.fence, status="queued", last_event_id=last_event_id, next_at=later)


def refused(session: Session, row: TrackedRun, error: str) -> None:
    """Record a try that failed, and when the next one is due."""
    pause = min(FIRST_PAUSE_SECONDS * 4**row.tries, LONGEST_PAUSE_SECONDS)
    leases.finish_if_held(
        session, WORK, row.id, row.fence, status="queued", tries=row.tries + 1, error=error, next_at=leases.now() + timedelta(seconds=pause)
    )


def reap(session: Session) -> dict[str, int]:
    """One round of the reaper, which sends what is due."""
    return {"followed": follow(session), **leases.reap(session, WORK)}


def follow(session: Session) -> int:
    """Have the jobs that have not ended sent to the trackers that every job is sent to, where these were chosen later. Returns how many."""
    try:
        everywhere = trackers.named(get_settings().trackers)
    except BadField as fault:  # a job is refused with it; the reaper has other things to do
        log.error("%s", fault)
        return 0
    count = 0
    for one in everywhere:
        there = exists().where(TrackedRun.job_id == Job.id, TrackedRun.kind == one.kind)
        missing = select(func.gen_random_uuid(), Job.id, literal(one.kind), literal(_wish(one), JSONB))
        missing = missing.where(Job.status.in_(UNENDED), Job.deleted_at.is_(None), ~there)
        made = insert(TrackedRun).from_select(["id", "job_id", "kind", "wish"], missing)
        count += len(session.scalars(made.on_conflict_do_nothing(index_elements=["job_id", "kind"]).returning(TrackedRun.id)).all())
    return count
