"""How long a claim on work lasts without a beat, by the database's clock, which all workers share."""

from __future__ import annotations

from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, DateTime, func, literal_column

from app.settings import get_settings


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
