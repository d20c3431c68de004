"""Database engine and sessions; the only file that commits.

A service takes a session and never commits. A request is one transaction: `Depends(get_session, scope="function")` commits before
the response is sent, then runs what was deferred with `on_commit`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NamedTuple, cast

from fastapi import Depends
from sqlalchemy import CursorResult, Engine, UpdateBase, create_engine, event, make_url
from sqlalchemy.orm import Session

from app.kit.json_safe import to_json
from app.settings import get_settings

_AFTER = "luthier_after_commit"
_UNDO = "luthier_after_rollback"


class Patience(NamedTuple):
    """Timeouts of this process towards others, in seconds; None is unlimited."""

    statement: float | None
    """Of one SQL statement, enforced by the server."""
    silence: float | None
    """Of any response of the database."""
    connect: int
    """Of a new connection, and of the check of a pooled one."""
    pool: float
    """Of waiting for a pooled connection."""
    broker: float


WORKER = Patience(statement=None, silence=None, connect=10, pool=30, broker=30)
WEB = Patience(statement=15, silence=18, connect=3, pool=5, broker=3)
"""A web process serves many with few threads: one that waits for an unresponsive server blocks all."""

patience = WORKER


def answer_people() -> None:
    """Use the timeouts of a web process from now on. Called before the first connection is made."""
    global patience
    patience = WEB


@functools.cache
def get_engine() -> Engine:
    """The connection pool of this process. The database's URL comes from `LUTHIER_DATABASE_URL`, which `luthier up` sets."""
    url = get_settings().database_url
    if not url:
        raise RuntimeError("LUTHIER_DATABASE_URL is not set. Start the studio with `luthier up`, or point it at a PostgreSQL.")
    wait = patience
    dead = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3, "tcp_user_timeout": 60_000}  # a host that went away
    given = make_url(url).query.get("options", "")
    options = {"options": f"{given} -c statement_timeout={int(wait.statement * 1000)}"} if wait.statement else {}
    engine = create_engine(
        url,
        pool_size=10,
        max_overflow=20,
        pool_timeout=wait.pool,
        pool_pre_ping=True,
        pool_recycle=1800,
        json_serializer=to_json,
        connect_args={"connect_timeout": wait.connect, **dead, **options},
    )
    if wait.silence:
        from app import pg_connection  # the driver is not imported before it is needed

        limits = {"ping_seconds": wait.connect, "silence_seconds": wait.silence}
        event.listen(engine, "do_connect", lambda dialect, record, args, named: pg_connection.connect(*args, **named, **limits))
    return engine


def touched(session: Session, change: UpdateBase) -> int:
    """Number of rows that an UPDATE or a DELETE matched."""
    return cast("CursorResult[Any]", session.execute(change)).rowcount  # `Session.execute` has one type for all statements


def on_commit(session: Session, action: Callable[[], object]) -> None:
    """Run `action` after this session's transaction is committed; never when it is rolled back."""
    session.info.setdefault(_AFTER, []).append(action)


def on_rollback(session: Session, action: Callable[[], object]) -> None:
    """Run `action` if this session's transaction is rolled back, such as the removal of files that its rows were to name."""
    session.info.setdefault(_UNDO, []).append(action)


@contextmanager
def transaction() -> Iterator[Session]:
    """One transaction: committed at the end, rolled back on any error."""
    with Session(get_engine(), expire_on_commit=False) as session:
        try:
            yield session
            session.commit()
        except BaseException:
            session.info.pop(_AFTER, None)
            session.rollback()
            for action in session.info.pop(_UNDO, []):
                action()
            raise
        session.info.pop(_UNDO, None)
        for action in session.info.pop(_AFTER, []):
            action()


def get_session() -> Iterator[Session]:
    """The FastAPI dependency behind `Db`."""
    with transaction() as session:
        yield session


Db = Annotated[Session, Depends(get_session, scope="function")]
"""What a route declares: `session: Db`."""
