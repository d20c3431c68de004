"""A studio that has been used for years, made in minutes: copies of one ended job with their events, written by the database itself."""

from __future__ import annotations

import uuid
from typing import Any

AT_ONCE = 500
"""Jobs of one transaction."""
OWN = ("id", "name", "created_at", "started_at", "finished_at", "idempotency_key", "comparison_id", "estimate")
"""Columns of a job that a copy has of its own, or that must be null. Its estimate does not wait for the comparison of its split."""
ESTIMATE = """estimate || '{"overlap": {"status": "none", "rows": 0}}' AS estimate"""


def fill(session: Any, pattern: uuid.UUID, jobs: int, points: int) -> uuid.UUID:
    """`jobs` copies of the job `pattern`, a minute apart, with `points` steps among them. The id of the newest copy."""
    from sqlalchemy import text

    each = max(1, points // jobs)
    for start in range(0, jobs, AT_ONCE):
        given = {"pattern": pattern, "from": start + 1, "to": min(start + AT_ONCE, jobs), "each": each}
        session.execute(text("CREATE TEMPORARY TABLE copies ON COMMIT DROP AS " + _copies()), given)
        session.execute(text(_jobs()))
        for events in (_others("('claimed', 'started')"), STEPS, _others("('evaluated', 'saved', 'finished')")):
            session.execute(text(events), given)
        session.execute(text(USES))
        session.commit()
    session.execute(text("ANALYZE"))
    session.commit()
    newest = "SELECT id FROM jobs WHERE name LIKE 'copy %' ORDER BY created_at DESC LIMIT 1"
    return uuid.UUID(str(session.scalar(text(newest))))


def _columns() -> str:
    from app.tables import Job

    return ", ".join(f'"{column.name}"' for column in Job.__table__.columns if column.name not in OWN)


def _copies() -> str:
    return f"""
        SELECT gen_random_uuid() AS id, 'copy ' || n AS name, {_columns()}, {ESTIMATE}, at AS created_at, at AS started_at, at + interval '50 s' AS finished_at
        FROM jobs, generate_series(CAST(:from AS int), CAST(:to AS int)) AS n, LATERAL (SELECT now() - n * interval '1 minute' AS at) AS moment
        WHERE jobs.id = :pattern"""


def _jobs() -> str:
    columns = f"id, name, estimate, created_at, started_at, finished_at, {_columns()}"
    return f"INSERT INTO jobs ({columns}) SELECT {columns} FROM copies"


def _others(types: str) -> str:
    return f"""
        INSERT INTO events (key, job_id, attempt, type, data, created_at)
        SELECT gen_random_uuid(), copies.id, 1, events.type, events.data, copies.created_at
        FROM copies, events WHERE events.job_id = :pattern AND events.type IN {types} ORDER BY copies.id, events.id"""


STEPS = """
    INSERT INTO events (key, job_id, attempt, type, data, created_at)
    SELECT gen_random_uuid(), copies.id, 1, 'step',
           usual.data || jsonb_build_object('step', n, 'loss', 3 * exp(-n / 300.0) + random() / 5, 'tokens', n * 100),
           copies.created_at + n * interval '40 ms'
    FROM copies, generate_series(1, CAST(:each AS int)) AS n,
         (SELECT data FROM events WHERE job_id = :pattern AND type = 'step' ORDER BY id LIMIT 1) AS usual
    ORDER BY copies.id, n"""
USES = """
    INSERT INTO machine_uses (id, user_id, project_id, kind, row_id, fence, started_at, ended_at)
    SELECT gen_random_uuid(), owner_id, project_id, 'jobs', id, 1, started_at, finished_at FROM copies"""
