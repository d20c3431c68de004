"""A studio that has been used for years, made in minutes: copies of one ended job with their events and models, and of one of each other thing
that lists show, written by the database itself."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
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
    session.execute(text(f"CREATE UNLOGGED TABLE of_pattern AS SELECT * FROM events WHERE job_id = '{pattern}'"))
    with without_indexes(session, "events"):
        _fill(session, pattern, jobs, each)
    session.execute(text("DROP TABLE of_pattern"))
    _settle(session)
    newest = "SELECT id FROM jobs WHERE name LIKE 'copy %' ORDER BY created_at DESC LIMIT 1"
    return uuid.UUID(str(session.scalar(text(newest))))


def _settle(session: Any) -> None:
    """Commit, and do now what the database would else do beside whatever is measured next, and has done long ago where rows came over years."""
    session.commit()
    with session.get_bind().connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for command in ("VACUUM ANALYZE", "CHECKPOINT"):
            connection.exec_driver_sql(command)


def _fill(session: Any, pattern: uuid.UUID, jobs: int, each: int) -> None:
    from sqlalchemy import text

    for start in range(0, jobs, AT_ONCE):
        given = {"pattern": pattern, "from": start + 1, "to": min(start + AT_ONCE, jobs), "each": each}
        session.execute(text("CREATE TEMPORARY TABLE copies ON COMMIT DROP AS " + _copies()), given)
        session.execute(text(_jobs()))
        for events in (_others("('claimed', 'started')"), STEPS, _others("('evaluated', 'saved', 'finished')")):
            session.execute(text(events), given)
        session.execute(text(USES))
        session.execute(text(_models()), given)
        session.execute(text(CHECKPOINTS), given)
        session.commit()


@contextmanager
def without_indexes(session: Any, table: str) -> Iterator[None]:
    """Indexes and constraints of a table but its primary key are made once it is full, which takes a fraction of keeping them up."""
    from sqlalchemy import text

    constraints = session.execute(text(CONSTRAINTS), {"table": table}).all()
    for name, _ in constraints:
        session.execute(text(f'ALTER TABLE "{table}" DROP CONSTRAINT "{name}"'))
    indexes = session.execute(text(INDEXES), {"table": table}).all()
    for name, _ in indexes:
        session.execute(text(f'DROP INDEX "{name}"'))
    session.commit()
    yield
    session.execute(text("SET maintenance_work_mem = '1GB'"))
    for _, made in indexes:
        session.execute(text(made))
    for name, made in constraints:
        session.execute(text(f'ALTER TABLE "{table}" ADD CONSTRAINT "{name}" {made}'))
    session.commit()


CONSTRAINTS = """
    SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint
    WHERE conrelid = CAST(CAST(:table AS text) AS regclass) AND contype IN ('u', 'f')"""
INDEXES = """
    SELECT relname, pg_get_indexdef(indexrelid) FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid
    WHERE indrelid = CAST(CAST(:table AS text) AS regclass) AND NOT indisprimary"""


CHECKPOINTS = """
    INSERT INTO checkpoints (id, job_id, step, path, manifest_sha256, bytes, metrics, best, created_at)
    SELECT gen_random_uuid(), copies.id, saved.step, saved.path, saved.manifest_sha256, saved.bytes, saved.metrics, saved.best, copies.finished_at
    FROM copies, (SELECT * FROM checkpoints WHERE job_id = :pattern AND deleted_at IS NULL ORDER BY step DESC LIMIT 2) AS saved"""
LISTED = ("files", "datasets", "evaluations", "prompts", "exchanges", "votes", "comparisons", "graders", "exports")
"""Tables whose rows lists show, each copied from its newest row."""
FRESH = {
    "id": "gen_random_uuid()", "name": "'copy ' || n", "filename": "'copy ' || n || '.jsonl'", "created_at": "now() - n * interval '1 minute'",
    "idempotency_key": "NULL", "parent_id": "NULL",
}  # fmt: skip
"""What a copy has of its own."""
UNLIKE = {
    "evaluations": {"status": "'cancelled'"},
    "datasets": {"origin": """pattern."origin" || jsonb_build_object('filename', 'copy ' || n || '.jsonl')"""},
}
"""What copies do not have of their pattern: no studio has ten thousand evaluations that wait, or so many datasets of one file."""


def fill_lists(session: Any, rows: int) -> None:
    """`rows` copies of the newest row of each table that lists show; a prompt with its newest version."""
    from sqlalchemy import text

    from app.tables import Base

    for name in LISTED:
        columns = [column.name for column in Base.metadata.tables[name].columns if column.computed is None]
        own = FRESH | UNLIKE.get(name, {})
        quoted, values = ", ".join(f'"{one}"' for one in columns), ", ".join(own.get(one) or f'pattern."{one}"' for one in columns)
        plain = "WHERE kind = 'strategies'" if name == "comparisons" else ""  # a copy of a search would be led on
        newest = f'SELECT * FROM "{name}" {plain} ORDER BY created_at DESC LIMIT 1'
        query = f'INSERT INTO "{name}" ({quoted}) SELECT {values} FROM ({newest}) AS pattern, generate_series(1, CAST(:rows AS int)) AS n'
        session.execute(text(query), {"rows": rows})
    session.execute(text(VERSIONS))
    _settle(session)


VERSIONS = """
    INSERT INTO prompt_versions (id, prompt_id, number, body)
    SELECT gen_random_uuid(), prompts.id, 1, (SELECT body FROM prompt_versions ORDER BY created_at DESC LIMIT 1)
    FROM prompts WHERE NOT EXISTS (SELECT FROM prompt_versions WHERE prompt_id = prompts.id)"""


def _models() -> str:
    from app.tables import Model

    own = {
        "id": "gen_random_uuid()",
        "name": "'ft:' || copies.id",
        "title": "copies.name",
        "job_id": "copies.id",
        "created_at": "copies.finished_at",
    }
    columns = [column.name for column in Model.__table__.columns]
    values = ", ".join(own.get(one) or f'models."{one}"' for one in columns)
    quoted = ", ".join(f'"{one}"' for one in columns)
    return f"INSERT INTO models ({quoted}) SELECT {values} FROM copies, models WHERE models.job_id = :pattern AND models.step IS NULL"


def _columns() -> str:
    from app.tables import Job

    return ", ".join(f'"{column.name}"' for column in Job.__table__.columns if column.name not in OWN and column.computed is None)


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
        SELECT gen_random_uuid(), copies.id, 1, of_pattern.type, of_pattern.data, copies.created_at
        FROM copies, of_pattern WHERE of_pattern.type IN {types} ORDER BY copies.id, of_pattern.id"""


STEPS = """
    INSERT INTO events (key, job_id, attempt, type, data, created_at)
    SELECT gen_random_uuid(), copies.id, 1, 'step',
           usual.data || jsonb_build_object('step', n, 'loss', 3 * exp(-n / 300.0) + random() / 5, 'tokens', n * 100),
           copies.created_at + n * interval '40 ms'
    FROM copies, generate_series(1, CAST(:each AS int)) AS n,
         (SELECT data FROM of_pattern WHERE type = 'step' ORDER BY id LIMIT 1) AS usual
    ORDER BY copies.id, n"""
USES = """
    INSERT INTO machine_uses (id, user_id, project_id, kind, row_id, fence, started_at, ended_at)
    SELECT gen_random_uuid(), owner_id, project_id, 'jobs', id, 1, started_at, finished_at FROM copies"""
