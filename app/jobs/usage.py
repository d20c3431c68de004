"""What was used of the machine, from the attempts that `app.tables.usage` records."""

from __future__ import annotations

import uuid
from collections.abc import Hashable
from datetime import UTC, datetime, timedelta

from sqlalchemy import Float, cast, func, select, update
from sqlalchemy.orm import Session

from app.jobs.fair_share import Use
from app.settings import get_settings
from app.tables import MachineUse, Project

HALF_LIVES = 10
"""What was used before so many half-lives is less than a thousandth now, and is not read."""


def hold_gpus(session: Session, key: uuid.UUID, fence: int, gpus: int) -> None:
    """Record with how many GPUs an attempt runs that was claimed in this transaction."""
    if gpus:
        session.execute(update(MachineUse).where(MachineUse.row_id == key, MachineUse.fence == fence).values(gpus=gpus))


def recent(session: Session, clock: float) -> dict[Hashable, Use]:
    """What each person has used lately, by the formula of `fair_share.decayed`, weighted by the project."""
    half_life = get_settings().fair_share_half_life_hours * 3600.0
    rate = func.ln(2.0) / half_life
    began = cast(func.extract("epoch", MachineUse.started_at), Float)
    ended = func.coalesce(cast(func.extract("epoch", MachineUse.ended_at), Float), clock)
    left = (func.exp(-rate * (clock - ended)) - func.exp(-rate * (clock - began))) / rate
    seconds = func.sum(left * func.greatest(MachineUse.gpus, 1) / Project.weight)
    query = select(MachineUse.user_id, cast(seconds, Float), func.max(ended)).join(Project, Project.id == MachineUse.project_id)
    since = datetime.fromtimestamp(clock, UTC) - timedelta(seconds=HALF_LIVES * half_life)
    query = query.where(MachineUse.ended_at.is_(None) | (MachineUse.ended_at > since)).group_by(MachineUse.user_id)
    return {person: Use(float(used), float(last)) for person, used, last in session.execute(query)}
