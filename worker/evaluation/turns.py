"""Long work in the generate worker: a few pieces at once, each in a thread of its own, so that the worker's own threads stay free for
people who chat. What waits is not claimed, so another worker may take it, and it may be announced again when this one dies."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable

from sqlalchemy.exc import SQLAlchemyError

log = logging.getLogger(__name__)


class Turns:
    """`free` are the turns left; `held` is what waits here or is worked on. The process stays for work that is `lasting`, which ends by
    itself when its worker leaves."""

    def __init__(self, at_once: int, *, lasting: bool = False) -> None:
        self.free, self.lasting = threading.Semaphore(at_once), lasting
        self.held: set[uuid.UUID] = set()
        self._lock = threading.Lock()

    def begin(self, key: uuid.UUID, work: Callable[[], None], *, waits: Callable[[], bool] = lambda: True) -> None:
        """See to it that the work is done, in its turn if it `waits` for one, and return at once. What is held is not put twice."""
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
            except SQLAlchemyError as error:  # the lease runs out, and it is announced again
                log.warning("%s was left: %s", key, error)
            finally:
                with self._lock:
                    self.held.discard(key)

        threading.Thread(target=in_turn, name=f"turn-{key.hex[:6]}", daemon=not self.lasting).start()
