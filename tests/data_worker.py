"""A data worker in a thread of the test: it takes what the outbox holds for it, as the relay and Celery would bring it."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import func, select

from app import db, queue
from app.tables import Outbox
from worker import tasks

BODIES = {queue.READ: tasks.read, queue.INSPECT: tasks.inspect}


@contextmanager
def data_worker() -> Iterator[None]:
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            for task, key in take():
                BODIES[task](str(key))
            time.sleep(0.03)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(60)


def take() -> list[tuple[str, uuid.UUID]]:
    with db.transaction() as session:
        found = session.scalars(select(Outbox).where(Outbox.sent_at.is_(None), Outbox.task.in_(BODIES)).order_by(Outbox.id)).all()
        for message in found:
            message.sent_at = func.clock_timestamp()
        return [(message.task, message.key) for message in found]
