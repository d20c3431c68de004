"""Engine, session, and the only file that commits.

A service takes a session and never commits. A request is one transaction: `Depends(get_session, scope="function")`
commits before the answer is sent, then runs what was put off with `on_commit`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

from fastapi import Depends
from sqlalchemy import Engine, create_engine
from sqlalchemy.orm import Session

from app.settings import get_settings
from app.storable import to_json

_AFTER = "luthier_after_commit"


@functools.cache
def get_engine() -> Engine:
    """The pool of this process. The database's address comes from `LUTHIER_DATABASE_URL`, which `luthier up` sets."""
    url = get_settings().database_url
    if not url:
        raise RuntimeError("LUTHIER_DATABASE_URL is not set. Start the studio with `luthier up`, or point it at a PostgreSQL.")
    return create_engine(url, pool_size=10, max_overflow=20, pool_pre_ping=True, pool_recycle=1800, json_serializer=to_json)


def on_commit(session: Session, action: Callable[[], object]) -> None:
    """Run `action` after this session's transaction is in; never when it is rolled back."""
    session.info.setdefault(_AFTER, []).append(action)


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
            raise
        for action in session.info.pop(_AFTER, []):
            action()


def get_session() -> Iterator[Session]:
    """The FastAPI dependency behind `Db`."""
    with transaction() as session:
        yield session


Db = Annotated[Session, Depends(get_session, scope="function")]
"""What a route declares: `session: Db`."""
