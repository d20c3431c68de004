"""Cache of the progress of jobs in a web process.

Folding all events of a long job for every view would cost more with every step. So a web process remembers the progress and the
last event folded, and reads only later ones. It is only a cache: Postgres is the truth, any process can answer, and an empty
cache costs only time.
"""

from __future__ import annotations

import threading
import uuid
from collections import OrderedDict

from sqlalchemy import Float, cast, func, select
from sqlalchemy.orm import Session

from app.events import from_row
from app.jobs.progress import JobProgress, fold
from app.tables import Event, Job

KEPT_JOBS = 64
"""A finished job of ten thousand steps takes some 6 MB, a usual one a tenth of that."""


class _Kept:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.progress = JobProgress()


_kept: OrderedDict[uuid.UUID, _Kept] = OrderedDict()
_lock = threading.Lock()


def progress_of(session: Session, job: Job) -> JobProgress:
    """The progress of a job. The result is the caller's own and does not change later."""
    kept = _of(job.id)
    with kept.lock:
        rows = session.scalars(select(Event).where(Event.job_id == job.id, Event.id > kept.progress.last_event_id).order_by(Event.id))
        for row in rows:
            fold(kept.progress, from_row(row.type, row.data), at=row.created_at, event_id=row.id)
        return kept.progress.snapshot()


def _of(job_id: uuid.UUID) -> _Kept:
    with _lock:
        kept = _kept.setdefault(job_id, _Kept())
        _kept.move_to_end(job_id)
        while len(_kept) > KEPT_JOBS:
            _kept.popitem(last=False)
        return kept


def best_losses(session: Session, found: list[Job]) -> dict[uuid.UUID, float]:
    """Lowest validation loss of each job, for lists; jobs without an evaluation are missing."""
    loss = cast(Event.data["loss"].astext, Float)
    query = select(Event.job_id, func.min(loss)).where(Event.job_id.in_([job.id for job in found]), Event.type == "evaluated")
    return {job_id: best for job_id, best in session.execute(query.group_by(Event.job_id)) if best is not None}
