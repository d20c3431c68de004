"""The lease protocol: how one worker at a time holds a row, and what happens when that worker dies.

    waiting ──claim──▶ held ──finish_if_held──▶ the result
       ▲                │ ▲└──heartbeat──┐
       │                │ └──────────────┘
       └────requeue─────┴──expire──▶ Work.on_death, which requeues, or gives up at the third death

A row is held while `lease_until` is set. Each claim increments the row's `fence`, and every write of a holder names the fence
that it claimed, so a worker that was taken for dead and wakes up later changes nothing. Every step is a conditional UPDATE, or a
SELECT that locks, by the database's clock, which all workers share.

A message of the queue only says "look at this row": a lost one is sent again by `redeliver`, a second one finds nothing to claim.
What a death means for a row is defined where its table is worked on, as `Work.on_death`; the rest is the same for all tables.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Generic, TypeVar

from sqlalchemy import ColumnElement, DateTime, and_, func, literal_column, select, true, update
from sqlalchemy.orm import InstrumentedAttribute, Session

from app import db, queue
from app.settings import get_settings
from app.tables import Leased, Outbox

OVER = datetime(1970, 1, 1, tzinfo=UTC)
"""The lease end of a holder that is known to be dead, so that nobody has to wait for the real one."""
MAX_DEATHS = 3
"""Work is given up after this many deaths of its workers."""
BEHIND_A_BACKLOG = 20.0
"""While other messages wait in its queue, a row is redelivered this many times less often."""
AT_MOST = 100
"""Maximum rows per round of the reaper."""

Row = TypeVar("Row", bound=Leased)


# The clock ----------------------------------------------------------------------------------------------------------


def now() -> ColumnElement[datetime]:
    return func.clock_timestamp(type_=DateTime(timezone=True))


def lease() -> ColumnElement[datetime]:
    """The end of a lease that is claimed or renewed now."""
    return now() + timedelta(seconds=get_settings().lease_seconds)


def answering_since() -> ColumnElement[datetime]:
    """When the database began to accept connections.

    A server that recovers from a crash runs for as long as that takes before it accepts connections; its launchers start when it
    does (`src/backend/postmaster/postmaster.c`, PM_RUN). Where this role may not see that time, the server's start is used.
    """
    launchers = (
        "SELECT max(backend_start) FROM pg_stat_activity WHERE backend_type IN ('autovacuum launcher', 'logical replication launcher')"
    )
    return literal_column(f"coalesce(({launchers}), pg_postmaster_start_time())", DateTime(timezone=True))


def could_beat() -> ColumnElement[bool]:
    """The database has answered for a whole lease, long enough for every healthy worker to have renewed its own."""
    return answering_since() < now() - timedelta(seconds=get_settings().lease_seconds)


def lapsed(lease_until: ColumnElement[datetime] | InstrumentedAttribute[datetime | None]) -> ColumnElement[bool]:
    """Whether the holder of a lease is dead: known to be, or without a heartbeat for a whole lease in which it could have sent one."""
    return (lease_until == OVER) | ((lease_until < now()) & could_beat())


# The work -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Work(Generic[Row]):
    """One kind of work on the rows of one table."""

    table: type[Row]
    task: str | None
    """The Celery task whose message makes a worker look at a row; None where the holders look for free rows themselves."""
    waits_as: str
    """The status of a row that may be claimed."""
    runs_as: str
    """The status of a row that is held; equal to `waits_as` where the lease alone distinguishes them."""
    since: Any
    """The column with the time of the request: the oldest is redelivered first."""
    on_death: Callable[[Session, Row, str], None]
    """`on_death(session, row, how)`: the holder of this locked row died, and `how` is the evidence, as "died with the studio.".
    It must end the lease: by `requeue`, or by ending the row."""
    due: ColumnElement[bool] = true()  # noqa: RUF009
    """Further conditions for a claim."""

    def free(self) -> ColumnElement[bool]:
        """Rows that wait for a claim."""
        return and_(self._alive(), self.table.status == self.waits_as, self.table.lease_until.is_(None), self.due)

    def taken(self) -> ColumnElement[bool]:
        """Rows that are held, including those whose holder has died."""
        return and_(self._alive(), self.table.status == self.runs_as, self.table.lease_until.is_not(None))

    def held(self, key: uuid.UUID, fence: int) -> ColumnElement[bool]:
        """This row, as long as it is held under this fence."""
        return and_(self.table.id == key, self.table.fence == fence, self.taken())

    def _alive(self) -> ColumnElement[bool]:
        deleted_at = getattr(self.table, "deleted_at", None)
        return true() if deleted_at is None else deleted_at.is_(None)


# The holder's part --------------------------------------------------------------------------------------------------


def claim(session: Session, work: Work[Row], key: uuid.UUID, **values: Any) -> Row | None:
    """Claim a row that waits, or one whose holder died, and set `values`. Returns the row with its new fence, or None: there is
    nothing to do or another worker holds it, so the message is dropped."""
    expire(session, work, key)
    table = work.table
    taken = update(table).where(table.id == key, work.free())
    taken = taken.values(status=work.runs_as, fence=table.fence + 1, lease_until=lease(), **values)
    return session.scalar(taken.returning(table).execution_options(populate_existing=True))


def heartbeat(session: Session, work: Work[Row], key: uuid.UUID, fence: int, **values: Any) -> bool:
    """Renew the lease and set `values`. False, and nothing is changed, when the row is no longer held under this fence: it was
    taken over, ended or deleted. The holder then stops and writes nothing more."""
    return _write(session, work, key, fence, lease_until=lease(), **values)


def finish_if_held(session: Session, work: Work[Row], key: uuid.UUID, fence: int, **values: Any) -> bool:
    """End the lease and set `values`, including the new status. False, and nothing is changed, when it is no longer held."""
    return _write(session, work, key, fence, lease_until=None, **values)


def _write(session: Session, work: Work[Row], key: uuid.UUID, fence: int, **values: Any) -> bool:
    return session.scalar(update(work.table).where(work.held(key, fence)).values(**values).returning(work.table.id)) is not None


def lock_if_held(session: Session, work: Work[Row], key: uuid.UUID, fence: int) -> Row | None:
    """The row, locked until the transaction ends, for a holder whose final writes take more than one UPDATE; None when it is no
    longer held. The caller sets `lease_until` to None, or calls `requeue`."""
    query = select(work.table).where(work.held(key, fence)).with_for_update()
    return session.scalar(query.execution_options(populate_existing=True))


class Beat(Generic[Row]):
    """A holder's heartbeat, at most once a second, each in a transaction of its own."""

    def __init__(self, work: Work[Row], key: uuid.UUID, fence: int) -> None:
        self.work, self.key, self.fence, self.last = work, key, fence, float("-inf")

    def __call__(self, **values: Any) -> bool:
        """False when the row is no longer held; True without a query when the last heartbeat was a moment ago."""
        if time.monotonic() - self.last < min(1.0, get_settings().beat_seconds):
            return True
        self.last = time.monotonic()
        with db.transaction() as session:
            return heartbeat(session, self.work, self.key, self.fence, **values)


def requeue(session: Session, work: Work[Row], row: Row, *, died: bool = False) -> bool:
    """Let a row that the caller has locked wait for another claim, and send its message. With `died` its worker's death is
    counted: at MAX_DEATHS nothing is sent and False returned, and the caller ends the row."""
    row.deaths += died
    row.lease_until = None
    if died and row.deaths >= MAX_DEATHS:
        return False
    row.status = work.waits_as
    session.flush()
    if work.task is not None:
        queue.enqueue(session, work.task, row.id)
    return True


# The reaper's part --------------------------------------------------------------------------------------------------


def expire(session: Session, work: Work[Row], key: uuid.UUID | None = None) -> int:
    """End the leases of dead holders: all, or one row's. Returns how many died. Rows that are locked are left to who locked them."""
    dead = select(work.table).where(work.taken(), lapsed(work.table.lease_until)).order_by(work.table.id).limit(AT_MOST)
    if key is not None:
        dead = dead.where(work.table.id == key)
    rows = session.scalars(dead.with_for_update(skip_locked=True).execution_options(populate_existing=True)).all()
    for row in rows:
        silent = f"was not heard of for {get_settings().lease_seconds:g} seconds."
        work.on_death(session, row, "died with the studio." if row.lease_until == OVER else silent)
    session.flush()
    return len(rows)


def redeliver(session: Session, work: Work[Row], *where: ColumnElement[bool], backlog: int | None = None) -> int:
    """Send the messages of waiting rows again whose own were lost, with Redis or with a worker that died before its claim.
    Returns how many.

    `backlog` messages wait in the queue; None asks Redis. While there are any, this row's is most likely among them: redelivering
    every row of a long queue every few seconds would only give the workers messages to drop.
    """
    if work.task is None:
        return 0
    waiting = queue.backlog(work.task) if backlog is None else backlog
    recent = now() - timedelta(seconds=get_settings().announce_again_seconds * (BEHIND_A_BACKLOG if waiting else 1))
    spoken_of = select(Outbox.id).where(
        Outbox.key == work.table.id, Outbox.task == work.task, Outbox.sent_at.is_(None) | (Outbox.sent_at > recent)
    )
    silent = select(work.table.id).where(work.free(), *where, ~spoken_of.exists()).order_by(work.since).limit(AT_MOST)
    keys = session.scalars(silent.with_for_update(skip_locked=True)).all()
    for key in keys:
        queue.enqueue(session, work.task, key)
    return len(keys)


def reap(session: Session, work: Work[Row]) -> dict[str, int]:
    """One round of the reaper over one kind of work."""
    return {"lapsed": expire(session, work), "announced": redeliver(session, work)}
