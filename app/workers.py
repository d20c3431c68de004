"""Which workers are alive. Each says so in Redis every few seconds; a word that is not repeated fades by itself."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from typing import NamedTuple

import redis

from app.queue import PREFIX, get_redis

FADES_SECONDS = 30
REPEAT_SECONDS = 10


class Worker(NamedTuple):
    queue: str
    name: str
    up_seconds: float
    silent_seconds: float


def say_alive(queue: str, started_at: float, *, name: str | None = None) -> None:
    """One word of life of this process, for `queue`: train, data, generate or relay."""
    name = name or f"{socket.gethostname()}:{os.getpid()}"
    word = json.dumps({"queue": queue, "name": name, "started_at": started_at, "seen_at": time.time()})
    get_redis().set(f"{PREFIX}alive:{queue}:{name}", word, ex=FADES_SECONDS)


def keep_saying(queue: str) -> threading.Event:
    """Say it every ten seconds from a thread, until the returned event is set. No fault of Redis is a reason to stop."""
    stop, started_at = threading.Event(), time.time()

    def talk() -> None:
        while True:
            with contextlib.suppress(redis.RedisError):  # a refusal too, as while its disk is full
                say_alive(queue, started_at)
            if stop.wait(REPEAT_SECONDS):
                return

    threading.Thread(target=talk, name=f"alive-{queue}", daemon=True).start()
    return stop


def alive() -> list[Worker]:
    """Every worker heard of in the last half minute; none when Redis is away or refuses to answer."""
    try:
        wire = get_redis()
        keys = list(wire.scan_iter(match=f"{PREFIX}alive:*", count=500))
        words = [json.loads(word) for word in (wire.mget(keys) if keys else []) if word]
    except (redis.RedisError, RuntimeError):
        return []
    now = time.time()
    found = [Worker(w["queue"], w["name"], max(0.0, now - w["started_at"]), max(0.0, now - w["seen_at"])) for w in words]
    return sorted(found)
