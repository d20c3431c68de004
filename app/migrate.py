"""Upgrades a database to the newest schema. The steps are in `migrations/versions/`."""

from __future__ import annotations

import ast

from sqlalchemy import Connection, NullPool, create_engine, inspect, text

from app.settings import RESOURCES, get_settings

OLDEST = "0037"
"""Programs that know this step go on beside those that know all of them, while the web processes and workers are replaced one after the other.
A step that removes, renames or narrows what older programs use raises it to its own number; better, such a step waits for a release."""

_LOCK = 7_314_159_265
"""Key of the advisory lock: two processes that start at once must not both migrate."""


def upgrade(url: str, to: str = "head") -> None:
    """Run the missing steps, in one transaction; nothing when the database is up to date, or newer and serves this program too. `to` is the
    number of the last one."""
    engine = create_engine(url, poolclass=NullPool)
    with engine.begin() as connection:
        if serves(connection):
            return
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
        run_alembic(connection, to)
        if is_current(connection):
            connection.execute(text(f"COMMENT ON TABLE alembic_version IS '{_SERVES}{OLDEST}'"))


_SERVES = "serves programs from step "
"""What a schema says to programs that do not know its newest step."""


def serves(connection: Connection) -> bool:
    """Whether this program can work with the schema: with the newest that it knows, or with a newer one that says so."""
    if is_current(connection):
        return True
    if not inspect(connection).has_table("alembic_version"):
        return False
    found = connection.scalar(text("SELECT version_num FROM alembic_version"))
    said = connection.scalar(text("SELECT obj_description('alembic_version'::regclass, 'pg_class')")) or ""
    return found not in steps() and said.startswith(_SERVES) and said.removeprefix(_SERVES) <= newest()


def is_current(connection: Connection) -> bool:
    """Whether the newest step has run, without importing Alembic, which costs a fifth of a second at each start."""
    if not inspect(connection).has_table("alembic_version"):
        return False
    found = connection.scalar(text("SELECT version_num FROM alembic_version"))
    return bool(found == newest())


def newest() -> str:
    """The number of the newest step."""
    return steps()[-1]


def steps() -> list[str]:
    """The numbers of all steps, oldest first: files are named `0001_….py` and their revision is that number."""
    return sorted(path.name.partition("_")[0] for path in (RESOURCES / "migrations" / "versions").glob("[0-9]*_*.py"))


def titles() -> dict[str, str]:
    """The first line of each step's docstring, by its number."""
    found = {}
    for path in sorted((RESOURCES / "migrations" / "versions").glob("[0-9]*_*.py")):
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or path.stem
        found[path.name.partition("_")[0]] = doc.splitlines()[0]
    return found


def run_alembic(connection: Connection, to: str = "head") -> None:
    from alembic import command
    from alembic.config import Config

    config = Config(RESOURCES / "alembic.ini")
    config.attributes["connection"] = connection
    command.upgrade(config, to)


if __name__ == "__main__":
    address = get_settings().database_url
    if not address:
        raise SystemExit("LUTHIER_DATABASE_URL is not set.")
    upgrade(address)
