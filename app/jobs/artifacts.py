"""Downloads of a job: its logs, and the folder TensorBoard reads."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy.orm import Session

from app.events import from_row
from app.jobs import service as jobs
from app.jobs.progress import JobProgress, fold
from app.languages import english
from app.settings import get_settings
from app.storage import places
from app.tables import Job

LOG = "a*/trainer.log"
TAIL_BYTES = 64 * 1024
"""Part of a trainer's output that the page shows; the download has all of it."""


def folder(job: Job) -> Path:
    return get_settings().data_dir / "runs" / str(job.id)


def tensorboard(job: Job) -> str:
    """The folder with the TensorBoard files of every attempt; empty where none was written."""
    return str(folder(job)) if any(folder(job).glob("a*/tensorboard")) else ""


def output(job: Job) -> list[str]:
    """The last lines of the newest attempt's trainer log, newest first."""
    found = _logs(job)
    if not found:
        return []
    with found[-1].open("rb") as file:
        file.seek(max(0, found[-1].stat().st_size - TAIL_BYTES))
        text = file.read().decode("utf-8", "replace")
    return [line for line in reversed(text.splitlines()) if line.strip()]


def log(session: Session, job: Job) -> Iterator[bytes]:
    """The whole log as text: the job's events, then the trainer log of each attempt. The session is not needed while it is sent."""
    with english():  # as the log of the trainer, with which it is read
        said = list(_said(session, job))
    return itertools.chain(said, _written(job))


def _said(session: Session, job: Job) -> Iterator[bytes]:
    """Every line, including those that the page has dropped."""
    seen = JobProgress()
    for row in jobs.events(session, job):
        last = seen.log[-1] if seen.log else None
        fold(seen, from_row(row.type, row.data), at=row.created_at)
        if seen.log and (line := seen.log[-1]) is not last:
            yield f"{row.created_at:%Y-%m-%d %H:%M:%S} {line.level.upper():<5} {line.message}\n".encode()


def _written(job: Job) -> Iterator[bytes]:
    for path in _logs(job):
        yield f"\n==> {path.parent.name}/{path.name} <==\n".encode()
        with path.open("rb") as file:
            while piece := file.read(2**20):
                yield piece


def _logs(job: Job) -> list[Path]:
    """`trainer.log` of each attempt, newest last. Each is stored at the end of its attempt, which may run on another machine."""
    own, ended = f"runs/{job.id}", job.status in jobs.ENDED
    found = places.below(own, LOG) if ended else get_settings().data_dir.joinpath(own).glob(LOG)
    return sorted(found, key=lambda path: int(path.parent.name[1:] or 0))
