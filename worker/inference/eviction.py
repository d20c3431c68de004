"""Evicts idle models by the rule that the pages show (`app.inference.residency.rule`), and publishes which models are loaded.

A thread of the generate worker checks once a second for models that have been idle, and for training jobs on this machine that
need their memory.
"""

from __future__ import annotations

import logging
import threading
import time

import redis

from app.inference import residency
from app.inference.residency import WorkerResidency
from app.settings import get_settings
from worker.inference import model_cache
from worker.inference.model_pool import ModelPool
from worker.runtime import devices
from worker.runtime.device import release

log = logging.getLogger(__name__)

EVERY_SECONDS = 1.0


def keep_tidy(shelf: ModelPool, worker: str) -> None:
    """Start the thread. It ends with the process."""

    def turn() -> None:
        while True:
            try:
                look(shelf, worker)
            except redis.RedisError as error:
                log.warning("Whether jobs need memory cannot be read from Redis: %s", error)
            except Exception:
                log.exception("Idle models could not be unloaded.")
            time.sleep(EVERY_SECONDS)

    threading.Thread(target=turn, name="tidy", daemon=True).start()


def look(shelf: ModelPool, worker: str) -> None:
    """One check: evict what has been idle too long and what training needs the memory of, then publish what is loaded."""
    idle_seconds, gone = get_settings().generate_idle_seconds, 0
    if told := bool(get_settings().redis_url):
        shelf.training_bytes = residency.room_asked(devices.is_gpu(shelf.device))
    before = time.monotonic() - idle_seconds
    gone += sum(one.evict(before) for one in model_cache.ALL)
    gone += shelf.evict(before)
    if shelf.memory() > shelf.limit():
        gone += sum(one.evict(time.monotonic()) for one in model_cache.ALL)
        gone += shelf.fit(0)
    if gone:
        release(shelf.device)
        log.info("%d idle models were unloaded; %d MiB are in use.", gone, shelf.memory() // 2**20)
    if told:
        residency.say(worker, standing(shelf))


def standing(shelf: ModelPool) -> WorkerResidency:
    return WorkerResidency(
        device=str(shelf.device),
        used_bytes=shelf.memory(),
        limit_bytes=max(0, shelf.limit()),
        training_bytes=shelf.training_bytes,
        models=[*shelf.ready(), *(ready for one in model_cache.ALL for ready in one.ready())],
    )
