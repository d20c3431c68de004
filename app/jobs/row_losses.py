"""Row losses: the loss of each training and validation row before a job and at its end, written by the trainer as `ledger.json`.

A row that stays hard while others became easy is often wrong or mislabeled, so the page of rows sorts by it.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.languages import mark
from app.storage import places
from app.tables import Dataset, Event, Job, User

FILE = "ledger.json"
SORTS = {
    "after": mark("highest final loss"),
    "before": mark("highest initial loss"),
    "gain": mark("smallest improvement"),
}


class Entry(NamedTuple):
    """One row: mean loss in nats per trained token (or per text, or per pair) before training and at its end. A validation row
    was not trained on, so its loss at the end is not due to memorization."""

    line: int
    before: float
    after: float
    tokens: int
    held_out: bool = False


def path_of(session: Session, job: Job) -> Path | None:
    """The path of a finished job's row losses, next to its result; None when it has none."""
    return _paths(session, [job.id]).get(job.id)


def _paths(session: Session, job_ids: Sequence[uuid.UUID]) -> dict[uuid.UUID, Path]:
    """Of those of these jobs that have row losses."""
    finished = select(Event.job_id, Event.data["path"].astext).where(Event.job_id.in_(job_ids), Event.type == "finished").order_by(Event.id)
    found = {}
    for job_id, result in session.execute(finished):  # the last counts
        if result:
            found[job_id] = (PurePosixPath(result).parent / FILE).as_posix()
    there = {job_id: places.path(place) for job_id, place in found.items()}
    return {job_id: path for job_id, path in there.items() if path.is_file()}


def jobs_of(session: Session, dataset: Dataset) -> list[Job]:
    """Finished jobs on this dataset that have row losses, newest first."""
    ended = select(Job.id).where(Job.dataset_id == dataset.id, Job.status == "succeeded", Job.deleted_at.is_(None))
    newest = session.scalars(ended.order_by(Job.finished_at.desc()).limit(20)).all()
    known = _paths(session, newest)
    found = {job.id: job for job in session.scalars(select(Job).where(Job.id.in_(known)))}
    return [found[key] for key in newest if key in found]


def read(session: Session, job: Job) -> list[Entry]:
    """The losses of a job, in the order of its rows; empty when it has none."""
    path = path_of(session, job)
    if path is None:
        return []
    data = json.loads(path.read_text())
    columns = (data[name] for name in Entry._fields if name in data)  # files from before validation rows have no such column
    return [Entry(*row) for row in zip(*columns, strict=True)]


def ranked(entries: list[Entry], sort: str) -> list[Entry]:
    """The rows, most doubtful first. `sort` is one of SORTS."""
    keys = {"after": lambda e: -e.after, "before": lambda e: -e.before, "gain": lambda e: e.before - e.after}
    return sorted(entries, key=keys[sort])


def summary(entries: list[Entry]) -> dict[str, Any]:
    """Means over the rows, and how many became harder."""
    count = max(1, len(entries))
    return {
        "rows": len(entries),
        "held_out": sum(e.held_out for e in entries),
        "before": sum(e.before for e in entries) / count,
        "after": sum(e.after for e in entries) / count,
        "harder": sum(e.after > e.before for e in entries),
    }


def job_of(session: Session, user: User, dataset: Dataset, key: str | None) -> Job | None:
    """The job of this public id, or the newest one that has row losses."""
    from app.jobs import service as jobs
    from app.kit import ids

    if key:
        return jobs.get(session, user, ids.parse(ids.JOB, key))
    found = jobs_of(session, dataset)
    return found[0] if found else None


def job_before(session: Session, dataset: Dataset) -> tuple[Job, Dataset] | None:
    """The newest finished job on the nearest ancestor of this version, and that version; None where this one has a job itself."""
    query = select(Job).where(Job.status == "succeeded", Job.deleted_at.is_(None)).order_by(Job.finished_at.desc()).limit(1)
    if session.scalar(select(Job.id).where(Job.dataset_id == dataset.id, Job.deleted_at.is_(None)).limit(1)):
        return None
    version, seen = dataset, {dataset.id}
    while version.parent_id and version.parent_id not in seen and (parent := session.get(Dataset, version.parent_id)) is not None:
        if (job := session.scalar(query.where(Job.dataset_id == parent.id))) is not None:
            return job, parent
        seen.add(parent.id)
        version = parent
    return None
