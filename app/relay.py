"""Sends the outbox's messages, and runs the reaper: `python -m app.relay`.

The relay reads messages that a committed transaction left in `outbox`, sends each to its queue and marks it sent, in one
transaction of its own: a crash between the two sends twice, never zero times. It is woken by NOTIFY and polls every few seconds
anyway. The reaper's rounds run in the same process, because they are short and both must always run.

Several relays may run at once: `FOR UPDATE SKIP LOCKED` distributes the messages among them.
"""

from __future__ import annotations

import logging
import select as waiting
import signal
import threading
import time
from collections.abc import Callable

import psycopg
import redis
from kombu.exceptions import OperationalError as BrokerError
from sqlalchemy import delete, func, select, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from app import leases, queue, retention
from app.db import touched, transaction
from app.kit import logs
from app.machines import heartbeats
from app.settings import get_settings
from app.storage import objects, sweeping
from app.tables import Base, Outbox

log = logging.getLogger("luthier.relay")

BATCH = 200
LOOK_SECONDS = 5.0
"""Polling interval, for messages without a NOTIFY, such as one that another relay held when it died."""

STOP_SECONDS = 0.5
"""How soon a request to stop is noticed."""

MAX_PAUSE_SECONDS = 5.0


def send_batch(session: Session) -> int:
    """Send up to 200 waiting messages, oldest first. Returns how many were sent.

    An unreachable broker raises before anything is marked, so the whole batch stays as it was.
    """
    waiting = select(Outbox).where(Outbox.sent_at.is_(None)).order_by(Outbox.id).limit(BATCH).with_for_update(skip_locked=True)
    messages = session.scalars(waiting).all()
    if not messages:
        return 0
    with queue.celery.producer_or_acquire() as producer:
        for message in messages:
            headers = {"luthier": message.context} if message.context else None
            queue.celery.send_task(message.task, args=[str(message.key)], producer=producer, retry=False, headers=headers)
    sent = update(Outbox).where(Outbox.id.in_([message.id for message in messages])).values(sent_at=func.clock_timestamp())
    session.execute(sent.execution_options(synchronize_session=False))
    return len(messages)


def database_is_settled(session: Session) -> bool:
    """Whether the database has answered for one whole lease.

    While it was unreachable no worker could send heartbeats, so just after a restart every running job looks dead; each gets the
    time for one heartbeat before the reaper decides.
    """
    return bool(session.scalar(select(leases.could_beat())))


def reap(session: Session) -> None:
    """One round over everything that has a lease."""
    if database_is_settled(session):
        _reap(session)


def take_over(session: Session) -> None:
    """Expire everything that the workers of a studio's last run held. Only for a caller who knows that none of them is left, as
    the holder of the data folder's lock does whose database is reached from this machine alone."""
    found = 0
    for table in (mapper.class_ for mapper in Base.registry.mappers if "lease_until" in mapper.columns):
        held = table.lease_until.is_not(None)
        taken = delete(Outbox).where(Outbox.sent_at.is_not(None), Outbox.key.in_(select(table.id).where(held)))
        session.execute(taken)  # their messages were lost with them
        found += touched(session, update(table).where(held).values(lease_until=leases.OVER))
    session.expire_all()
    if found:
        log.info("%d things were held when the studio died", found)
        _reap(session)


def _reap(session: Session) -> None:
    from app.batches import service as batches
    from app.datasets import ingest_task, inspections
    from app.distillations import service as distillations
    from app.evals import service as evals
    from app.evaluation import service as evaluations
    from app.jobs import service as jobs
    from app.models import exports
    from app.models import imports as model_imports
    from app.prompts import runs as prompt_runs
    from app.searches import service as searches
    from app.tracking import service as tracking
    from app.webhooks import service as webhooks

    for service in (
        jobs,
        searches,
        evaluations,
        ingest_task,
        inspections,
        model_imports,
        exports,
        prompt_runs,
        distillations,
        batches,
        evals,
        webhooks,
        tracking,
    ):
        found = service.reap(session)
        if found and (not isinstance(found, dict) or any(found.values())):
            log.info("reaped %s: %s", service.__name__.removeprefix("app."), found)


class Waker:
    """A connection that listens for NOTIFY. When it breaks, the next wait opens another."""

    def __init__(self) -> None:
        self.connection: psycopg.Connection | None = None

    def wait(self, seconds: float, stop: Callable[[], bool]) -> None:
        """Sleep until a message is enqueued, at most `seconds`, or until it is time to `stop`."""
        deadline = time.monotonic() + seconds
        try:
            if self.connection is None:
                self.connection = psycopg.connect(
                    str(get_settings().database_url).replace("+psycopg", ""), autocommit=True, connect_timeout=5
                )
                self.connection.execute(f"LISTEN {queue.OUTBOX_CHANNEL}")
                return  # messages enqueued before we listened are polled now
            # psycopg's own waiting polls ten times a second, which uses CPU in an idle studio.
            while not self._told() and not stop() and (left := deadline - time.monotonic()) > 0:
                waiting.select([self.connection], [], [], min(left, STOP_SECONDS))
        except psycopg.Error:
            self.close()
            time.sleep(STOP_SECONDS)

    def _told(self) -> bool:
        return self.connection is not None and any(True for _ in self.connection.notifies(timeout=0))

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = None


def relay(stop: Callable[[], bool]) -> None:
    """The loop: send, reap when it is time, sleep. An error of an unreachable server is logged and retried."""
    settings, waker = get_settings(), Waker()
    next_reap, next_retention, failures = time.monotonic(), time.monotonic(), 0
    while not stop():
        try:
            with transaction() as session:
                sent = send_batch(session)
            if time.monotonic() >= next_reap:
                next_reap = time.monotonic() + settings.reap_seconds
                with transaction() as session:
                    reap(session)
            if time.monotonic() >= next_retention:
                next_retention = time.monotonic() + retention.EVERY_SECONDS
                with transaction() as session:
                    if removed := retention.apply(session):
                        log.info("removed after their time: %s", removed)
            failures = 0
            if not sent:
                waker.wait(min(LOOK_SECONDS, next_reap - time.monotonic()), stop)
        except (DBAPIError, BrokerError, redis.RedisError, OSError) as error:
            failures += 1
            pause = min(MAX_PAUSE_SECONDS, 0.2 * 2 ** min(failures, 10))
            log.warning("a server is away, trying again in %.1f s: %s", pause, str(error).splitlines()[0])
            wait_out(pause, stop)
    waker.close()


def wait_out(seconds: float, stop: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not stop():
        time.sleep(0.1)


def main() -> None:
    logs.configure()
    asked = threading.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: asked.set())
    objects.check()
    sweeping.begin(asked)
    talking = heartbeats.keep_saying("relay")
    log.info("relaying")
    relay(asked.is_set)
    talking.set()


if __name__ == "__main__":
    main()
