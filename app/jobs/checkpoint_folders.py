"""The folders of checkpoints on this machine: those that are no longer kept are removed, after the commit that says so."""

from __future__ import annotations

import functools
import shutil
import uuid

from sqlalchemy import select
from sqlalchemy.orm import Session

from app import db
from app.leases import now
from app.settings import get_settings
from app.tables import Checkpoint


def keep_newest(session: Session, job_id: uuid.UUID, keep: int) -> None:
    """Keep a job's newest `keep` checkpoints and its best; remove the folders of the others after the commit."""
    kept = session.scalars(
        select(Checkpoint)
        .where(Checkpoint.job_id == job_id, Checkpoint.deleted_at.is_(None))
        .order_by(Checkpoint.step.desc())
        .with_for_update(skip_locked=True)
    ).all()
    for old in kept[keep:]:
        if not old.best:
            old.deleted_at = session.scalar(select(now()))
            folder = get_settings().data_dir / old.path
            db.on_commit(session, functools.partial(shutil.rmtree, folder, ignore_errors=True))


def remove(session: Session, job_id: uuid.UUID) -> None:
    """Remove the folders of a job's deleted checkpoints after the commit: now, and again with each claim, in case the process
    that deleted them died before."""
    gone = session.scalars(select(Checkpoint.path).where(Checkpoint.job_id == job_id, Checkpoint.deleted_at.is_not(None))).all()
    for path in gone:
        db.on_commit(session, functools.partial(shutil.rmtree, get_settings().data_dir / path, ignore_errors=True))


def sweep(session: Session) -> int:
    """Remove folders of deleted checkpoints that are still on disk, of jobs that nobody claims any more. Returns how many."""
    root = get_settings().data_dir
    there = {folder.relative_to(root).as_posix() for folder in root.glob("runs/*/a*/checkpoint-*")}
    gone = (
        session.scalars(select(Checkpoint.path).where(Checkpoint.path.in_(there), Checkpoint.deleted_at.is_not(None))).all()
        if there
        else []
    )
    for path in gone:
        shutil.rmtree(root / path, ignore_errors=True)
    return len(gone)
