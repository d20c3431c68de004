"""What was used of the machine, from the attempts that `app.tables.usage` records."""

from __future__ import annotations

import math
import uuid
from collections.abc import Hashable
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from sqlalchemy import Float, cast, func, select, update
from sqlalchemy.orm import Session

from app.jobs.fair_share import Use
from app.leases import now
from app.settings import get_settings
from app.tables import JSON, MachineUse, Project

HALF_LIVES = 10
"""What was used before so many half-lives is less than a thousandth now, and is not read."""


def hold_gpus(session: Session, key: uuid.UUID, fence: int, gpus: int) -> None:
    """Record with how many GPUs an attempt runs that was claimed in this transaction."""
    if gpus:
        session.execute(update(MachineUse).where(MachineUse.row_id == key, MachineUse.fence == fence).values(gpus=gpus))


def record_energy(session: Session, key: uuid.UUID, fence: int, joules: float | None) -> None:
    """Record what the GPUs of an attempt have used so far; nothing where they do not count it."""
    if joules is not None:
        session.execute(update(MachineUse).where(MachineUse.row_id == key, MachineUse.fence == fence).values(joules=joules))


class JobCost(NamedTuple):
    """What a job has used in all its attempts. `kwh` is None where the GPUs count no energy, `amount` where no price is set."""

    gpu_hours: float
    kwh: float | None
    amount: float | None
    currency: str

    def as_json(self) -> JSON:
        return self._asdict()


def cost_of(session: Session, key: uuid.UUID) -> JobCost | None:
    """None while nothing is known but the time."""
    ended = func.coalesce(MachineUse.ended_at, now())
    seconds = cast(func.extract("epoch", ended - MachineUse.started_at), Float) * func.greatest(MachineUse.gpus, 1)
    query = select(func.sum(seconds), func.sum(MachineUse.joules)).where(MachineUse.row_id == key)
    total, joules = session.execute(query).one()
    settings = get_settings()
    per_hour, per_kwh = settings.price_per_gpu_hour, settings.price_per_kwh
    if total is None or (joules is None and per_hour is None):
        return None
    hours, kwh = float(total) / 3600, None if joules is None else float(joules) / 3.6e6
    known = [price * amount for price, amount in ((per_hour, hours), (per_kwh, kwh)) if price is not None and amount is not None]
    return JobCost(hours, kwh, sum(known) if known else None, settings.currency)


def recent(session: Session, clock: float) -> dict[Hashable, Use]:
    """What each person has used lately, by the formula of `fair_share.decayed`, weighted by the project."""
    half_life = get_settings().fair_share_half_life_hours * 3600.0
    rate = math.log(2) / half_life
    began = func.date_part("epoch", MachineUse.started_at)
    ended = func.coalesce(func.date_part("epoch", MachineUse.ended_at), clock)
    left = (func.exp(-rate * (clock - ended)) - func.exp(-rate * (clock - began))) / rate
    seconds = func.sum(left * func.greatest(MachineUse.gpus, 1) / func.coalesce(Project.weight, 1.0))
    query = select(MachineUse.user_id, seconds, func.max(ended)).outerjoin(Project, Project.id == MachineUse.project_id)
    since = datetime.fromtimestamp(clock, UTC) - timedelta(seconds=HALF_LIVES * half_life)
    query = query.where(MachineUse.ended_at.is_(None) | (MachineUse.ended_at > since)).group_by(MachineUse.user_id)
    return {person: Use(float(used), float(last)) for person, used, last in session.execute(query)}
