"""Which checkpoints of a job stay where they are kept in an object storage: none is removed before a newer one is complete there."""

from __future__ import annotations

import functools
import shutil
import uuid
from collections.abc import Collection

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app import db, leases
from app.jobs import lifecycle
from app.jobs.lifecycle import Claim
from app.settings import get_settings
from app.tables import Checkpoint


def newest_first(session: Session, job_id: uuid.UUID) -> list[str]:
    """Paths of a job's checkpoints that were not deleted."""
    there = select(Checkpoint.path).where(Checkpoint.job_id == job_id, Checkpoint.deleted_at.is_(None))
    return list(session.scalars(there.order_by(Checkpoint.step.desc())))


def sweep(session: Session, held: Claim, stored: int, waiting: Collection[int], left_out: Collection[int], keep: int) -> list[str]:
    """Mark what is not needed now that the checkpoint of step `stored` is complete: all older ones but the best, those that wait to be
    stored, and as many as make `keep`; first those that were left out, which no other machine has. Returns their paths; nothing where
    the attempt is no longer held."""
    if leases.lock_if_held(session, lifecycle.WORK, held.job_id, held.fence) is None:
        return []
    older = select(Checkpoint).where(Checkpoint.job_id == held.job_id, Checkpoint.deleted_at.is_(None), Checkpoint.step < stored)
    rows = [row for row in session.scalars(older.order_by(Checkpoint.step.desc())) if row.step not in waiting]
    gone = [row for row in rows if row.step in left_out] + [row for row in rows if row.step not in left_out][max(0, keep - 1) :]
    for row in (removed := [row for row in gone if not row.best]):
        row.deleted_at = session.scalar(select(func.clock_timestamp()))
        db.on_commit(session, functools.partial(shutil.rmtree, get_settings().data_dir / row.path, ignore_errors=True))
    return [row.path for row in removed]
