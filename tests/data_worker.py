"""A data worker in a thread of the test: it takes what the outbox holds for it, as the relay and Celery would bring it."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import func, select

from app import db, queue
from app.datasets import ingest_task, inspections
from app.tables import Outbox

BODIES = {queue.READ: ingest_task.read, queue.INSPECT: inspections.answer}


@contextmanager
def data_worker() -> Iterator[None]:
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            for task, key in take():
                BODIES[task](key)
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
