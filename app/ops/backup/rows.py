"""Rows out of a database and into another, by PostgreSQL's own COPY: one file per table, the same for equal rows."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
from psycopg import sql

from app.errors import BadData, Conflict
from app.settings import get_settings

_PIECE = 2**20


class TableHash(NamedTuple):
    rows: int
    sha256: str


def connect(**options: Any) -> psycopg.Connection:
    """A connection of its own to the studio's database, without the time limits of the pool."""
    return psycopg.connect(str(get_settings().database_url).replace("+psycopg", ""), connect_timeout=10, **options)


@contextmanager
def snapshot() -> Iterator[psycopg.Connection]:
    """A connection that sees the rows of one moment."""
    with connect() as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        connection.read_only = True
        yield connection


def tables(connection: psycopg.Connection) -> list[str]:
    found = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1")
    return [str(row[0]) for row in found]


def schema_of(connection: psycopg.Connection) -> str | None:
    """The number of the newest migration that ran; None in an empty database."""
    if "alembic_version" not in tables(connection):
        return None
    row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    return str(row[0]) if row else None


def columns(connection: psycopg.Connection, table: str) -> list[str]:
    """By name, since a table that was migrated has its columns in another order than a new one."""
    found = connection.execute(
        "SELECT column_name FROM information_schema.columns "
        "WHERE table_schema = 'public' AND table_name = %s AND is_generated = 'NEVER' ORDER BY 1",
        [table],
    )
    return [str(row[0]) for row in found]


def _key(connection: psycopg.Connection, table: str) -> list[str]:
    found = connection.execute(
        "SELECT a.attname FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = ANY(i.indkey) "
        "WHERE i.indrelid = %s::regclass AND i.indisprimary ORDER BY 1",
        [table],
    )
    return [str(row[0]) for row in found]


def read(connection: psycopg.Connection, table: str, write: Callable[[bytes], object], names: list[str] | None = None) -> TableHash:
    """Give the rows of a table to `write`, in the order of its primary key, as COPY's text."""
    names = names or columns(connection, table)
    listed = sql.SQL(", ").join(map(sql.Identifier, names))
    key = sql.SQL(", ").join(map(sql.Identifier, _key(connection, table) or names))
    query = sql.SQL("COPY (SELECT {} FROM {} ORDER BY {}) TO STDOUT").format(listed, sql.Identifier(table), key)
    digest, count = hashlib.sha256(), 0
    with connection.cursor() as cursor, cursor.copy(query) as copy:
        for piece in copy:
            data = bytes(piece)
            digest.update(data)
            count += data.count(b"\n")  # COPY writes a line break inside a value as \n
            write(data)
    return TableHash(count, digest.hexdigest())


def sequences(connection: psycopg.Connection) -> dict[str, int]:
    """The numbers that the next rows must lie above. Read after the rows: a sequence only rises."""
    found = connection.execute("SELECT sequencename, last_value FROM pg_sequences WHERE schemaname = 'public' AND last_value IS NOT NULL")
    return {str(name): int(value) for name, value in found}


def refuse_full(connection: psycopg.Connection) -> None:
    if found := tables(connection):
        raise Conflict(
            f"The database is not empty: it has {len(found)} tables.",
            hint="Restore into a new database, or into a data folder that holds no studio.",
            code="not_empty",
        )


def load(connection: psycopg.Connection, given: dict[str, Any], object_of: Callable[[str], Path], set_: dict[str, int]) -> None:
    """Fill empty tables, in one transaction, and compare what is there afterwards with what was backed up.

    Foreign keys are dropped first and made again at the end: tables refer to each other in circles, and making a key checks all rows.
    """
    keys = connection.execute(
        "SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint "
        "WHERE contype = 'f' AND connamespace = 'public'::regnamespace"
    ).fetchall()
    for table, name, _ in keys:
        connection.execute(sql.SQL("ALTER TABLE {} DROP CONSTRAINT {}").format(sql.Identifier(table), sql.Identifier(name)))
    connection.execute("DELETE FROM alembic_version")  # what the migrations wrote themselves
    for table, told in given.items():
        listed = sql.SQL(", ").join(map(sql.Identifier, told["columns"]))
        query = sql.SQL("COPY {} ({}) FROM STDIN").format(sql.Identifier(table), listed)
        with connection.cursor() as cursor, cursor.copy(query) as copy, gzip.open(object_of(told["object"])) as file:
            while piece := file.read(_PIECE):
                copy.write(piece)
    for table, name, definition in keys:
        connection.execute(
            sql.SQL("ALTER TABLE {} ADD CONSTRAINT {} {}").format(sql.Identifier(table), sql.Identifier(name), sql.SQL(definition))
        )
    for name, value in set_.items():
        connection.execute("SELECT setval(%s::regclass, %s)", [name, value])
    for table, told in given.items():
        found = read(connection, table, lambda data: None, told["columns"])
        if found != TableHash(told["rows"], told["sha256"]):
            raise BadData(f"The rows of {table} differ from those that were backed up.", hint="Restore another snapshot.", param=table)
