"""Upgrades a database to the newest schema. The steps are in `migrations/versions/`."""

from __future__ import annotations

from sqlalchemy import Connection, NullPool, create_engine, inspect, text

from app.settings import RESOURCES, get_settings

_LOCK = 7_314_159_265
"""Key of the advisory lock: two processes that start at once must not both migrate."""


def upgrade(url: str) -> None:
    """Run the missing steps, in one transaction; nothing when the database is up to date."""
    engine = create_engine(url, poolclass=NullPool)
    with engine.begin() as connection:
        if is_current(connection):
            return
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
        run_alembic(connection)


def is_current(connection: Connection) -> bool:
    """Whether the newest step has run, without importing Alembic, which costs a fifth of a second at each start."""
    if not inspect(connection).has_table("alembic_version"):
        return False
    found = connection.scalar(text("SELECT version_num FROM alembic_version"))
    return bool(found == newest())


def newest() -> str:
    """The number of the newest step: files are named `0001_….py` and their revision is that number."""
    return max(path.name.partition("_")[0] for path in (RESOURCES / "migrations" / "versions").glob("[0-9]*_*.py"))


def run_alembic(connection: Connection) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config(RESOURCES / "alembic.ini")
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


if __name__ == "__main__":
    address = get_settings().database_url
    if not address:
        raise SystemExit("LUTHIER_DATABASE_URL is not set.")
    upgrade(address)
