"""Detects a worker that is alive but receives no messages, and ends it, so that its parent starts another.

A Celery worker that loses its broker at a bad moment may come back with a connection on which no message arrives (celery#8030,
#8091, #10205), while its heartbeat thread continues. Redis serves the consumer that has waited longest, so a worker that listens
and has a free slot is not passed over for long: where messages keep waiting, it is deaf.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence

import redis
from celery.worker import state

from app.queue import PREFIX, get_redis

log = logging.getLogger(__name__)

LEAVING_SECONDS = 30.0
"""Time for a deaf worker's orderly shutdown before it is killed."""

DEAF = 70
"""Exit code of a worker that did not even receive the request to shut down (EX_SOFTWARE)."""


class Hearing:
    """Whether a worker of these queues, with room for `places` tasks at a time, takes the messages that wait there."""

    def __init__(self, queues: Sequence[str], places: int, patience_seconds: float) -> None:
        self.keys = [f"{PREFIX}{queue}" for queue in queues]
        self.places, self.patience_seconds = places, patience_seconds
        self.taken = state.all_total_count[0]
        self.well_at = time.monotonic()  # when there was last an innocent reason for taking nothing

    def is_deaf(self) -> bool:
        """One check, made every few seconds. An unreachable broker is not the worker's fault."""
        taken, busy = state.all_total_count[0], len(state.active_requests) >= self.places
        try:
            waiting = sum(int(get_redis().llen(key)) for key in self.keys)
        except redis.RedisError:
            waiting = 0
        if busy or not waiting or taken != self.taken:
            self.taken, self.well_at = taken, time.monotonic()
        return time.monotonic() - self.well_at > self.patience_seconds


def watch(hearing: Hearing, leaving: Callable[[], bool]) -> None:
    """Check regularly, from a thread, until the worker is leaving; make it leave when it is deaf."""

    def look() -> None:
        while not leaving():
            if hearing.is_deaf():
                log.error("Messages wait and this worker receives none of them. It exits, to be restarted.")
                return leave(LEAVING_SECONDS)
            time.sleep(hearing.patience_seconds / 12)

    threading.Thread(target=look, name="watchdog", daemon=True).start()


def leave(grace_seconds: float) -> None:
    """Shut down this process, or kill it after the grace period. Its claims are claimed again by its successor."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace_seconds)
    os._exit(DEAF)
