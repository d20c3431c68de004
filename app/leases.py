"""How long a claim on work lasts without a beat, by the database's clock, which all workers share."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from sqlalchemy import ColumnElement, DateTime, func, literal_column
from sqlalchemy.orm import InstrumentedAttribute

from app.settings import get_settings

OVER = datetime(1970, 1, 1, tzinfo=UTC)
"""Until when a lease holds whose holder is known to be dead, so that nobody need wait for it to pass."""


def now() -> ColumnElement[datetime]:
    return func.clock_timestamp(type_=DateTime(timezone=True))


def lease() -> ColumnElement[datetime]:
    """Until when a claim or a beat of now holds."""
    return now() + timedelta(seconds=get_settings().lease_seconds)


def answering_since() -> ColumnElement[datetime]:
    """When the database began to let anybody in.

    A server that recovers from a crash runs for as long as that takes before it lets anybody in; its launchers start when it does
    (`src/backend/postmaster/postmaster.c`, PM_RUN). Where this role may not see when that was, the server's start is taken.
    """
    launchers = (
        "SELECT max(backend_start) FROM pg_stat_activity WHERE backend_type IN ('autovacuum launcher', 'logical replication launcher')"
    )
    return literal_column(f"coalesce(({launchers}), pg_postmaster_start_time())", DateTime(timezone=True))


def could_beat() -> ColumnElement[bool]:
    """The database has answered for a whole lease, long enough for every healthy worker to have renewed its own."""
    return answering_since() < now() - timedelta(seconds=get_settings().lease_seconds)


def lapsed(lease_until: ColumnElement[datetime] | InstrumentedAttribute[datetime | None]) -> ColumnElement[bool]:
    """Whether the holder of a lease is dead: known to be, or not heard of for a whole lease in which it could have beaten."""
    return (lease_until == OVER) | ((lease_until < now()) & could_beat())
