"""Limits the long tasks of a generate worker: a few run at once, each in a thread of its own, so that the worker's own threads stay free
for chats. A task that waits is not claimed, so another worker may claim it, and it is redelivered when this worker dies."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable

from sqlalchemy.exc import SQLAlchemyError

log = logging.getLogger(__name__)


class Turns:
    """Threads for tasks, of which `at_once` run at a time; `held` are the keys of those that wait or run. Threads of `lasting` tasks are
    no daemons: the process waits for them at exit, and they end by themselves when the worker stops."""

    def __init__(self, at_once: int, *, lasting: bool = False) -> None:
        self.free, self.lasting = threading.Semaphore(at_once), lasting
        self.held: set[uuid.UUID] = set()
        self._lock = threading.Lock()

    def begin(self, key: uuid.UUID, work: Callable[[], None], *, waits: Callable[[], bool] = lambda: True) -> None:
        """Start `work` in a thread and return at once; if `waits()`, it begins when fewer than `at_once` run. A key that waits or runs
        already is ignored."""
        with self._lock:
            if key in self.held:
                return
            self.held.add(key)

        def in_turn() -> None:
            try:
                if waits():
                    with self.free:
                        work()
                else:
                    work()
            except SQLAlchemyError as error:  # the lease expires, and the task is redelivered
                log.warning("%s was left: %s", key, error)
            finally:
                with self._lock:
                    self.held.discard(key)

        threading.Thread(target=in_turn, name=f"turn-{key.hex[:6]}", daemon=not self.lasting).start()
