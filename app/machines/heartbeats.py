"""Worker heartbeats: each worker writes a key with an expiry to Redis every few seconds. Those that train also publish their
machine's hardware, since the web process may run on another."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from typing import NamedTuple

import redis
from pydantic import ValidationError

from app.kit import once
from app.machines import hardware
from app.machines.hardware import Machine
from app.queue import PREFIX, get_redis

FADES_SECONDS = 30
REPEAT_SECONDS = 10
MACHINES = f"{PREFIX}machines"
FORGOTTEN_SECONDS = 7 * 86_400
"""A silent training machine is still planned with for this long if there is no other: its worker may only be restarting."""


class Worker(NamedTuple):
    queue: str
    name: str
    up_seconds: float
    silent_seconds: float


def say_alive(queue: str, started_at: float, *, name: str | None = None) -> None:
    """One heartbeat of this process, for `queue`: train, evaluate, data, import, export, generate or relay."""
    name = name or f"{socket.gethostname()}:{os.getpid()}"
    word = json.dumps({"queue": queue, "name": name, "started_at": started_at, "seen_at": time.time()})
    get_redis().set(f"{PREFIX}alive:{queue}:{name}", word, ex=FADES_SECONDS)


def keep_saying(queue: str) -> threading.Event:
    """Send heartbeats every ten seconds from a thread, until the returned event is set. Errors of Redis do not stop it."""
    stop, started_at = threading.Event(), time.time()

    def talk() -> None:
        while True:
            with contextlib.suppress(redis.RedisError):  # a refusal too, as while its disk is full
                say_alive(queue, started_at)
                if queue == "train":
                    say_machine()
            if stop.wait(REPEAT_SECONDS):
                return

    threading.Thread(target=talk, name=f"alive-{queue}", daemon=True).start()
    return stop


def alive() -> list[Worker]:
    """Workers with a heartbeat in the last half minute; empty when Redis is unreachable or refuses to answer."""
    try:
        wire = get_redis()
        keys = list(wire.scan_iter(match=f"{PREFIX}alive:*", count=500))
        words = [json.loads(word) for word in (wire.mget(keys) if keys else []) if word]
    except (redis.RedisError, RuntimeError):
        return []
    now = time.time()
    found = [Worker(w["queue"], w["name"], max(0.0, now - w["started_at"]), max(0.0, now - w["seen_at"])) for w in words]
    return sorted(found)


# The machine that trains ----------------------------------------------------------------------------------------------


def say_machine(here: Machine | None = None, *, name: str | None = None) -> None:
    """Publish this machine's hardware and measured speeds, for estimates of jobs."""
    found = {"seen_at": time.time(), "machine": (here or hardware.this_machine()).model_dump(mode="json")}
    get_redis().hset(MACHINES, name or socket.gethostname(), json.dumps(found))


def training_machine() -> Machine:
    """The machine that the next job is planned for: the one that trains. Of several, the weakest, since any may take the job.
    This one where none was ever heard of, and while Redis is unreachable."""
    return once.of("the machine that trains", _training_machine)


def _training_machine() -> Machine:
    heard = machines()
    newest = min((silent for _, silent, _ in heard), default=FORGOTTEN_SECONDS)
    there = [found for _, silent, found in heard if silent - newest < FADES_SECONDS]
    if not there or newest >= FORGOTTEN_SECONDS:
        return hardware.this_machine()
    return min(there, key=lambda found: (found.cuda, found.training_memory_bytes))


def machines() -> list[tuple[str, float, Machine]]:
    """(host, seconds since it was heard of, machine) of all that ever sent a message; those of another version of the studio are
    skipped."""
    found = []
    with contextlib.suppress(redis.RedisError, RuntimeError):
        heard: dict[bytes, bytes] = get_redis().hgetall(MACHINES)  # type: ignore[assignment]
        for host, word in heard.items():
            with contextlib.suppress(ValidationError, ValueError, KeyError, TypeError):
                said = json.loads(word)
                found.append((host.decode(), max(0.0, time.time() - float(said["seen_at"])), Machine.model_validate(said["machine"])))
    return sorted(found, key=lambda one: one[:2])
