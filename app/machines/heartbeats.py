"""Worker heartbeats: each worker writes a key with an expiry to Redis every few seconds. Those that train also publish their
machine's hardware, since the web process may run on another. Times are by the clock of Redis, which all of them share."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from typing import Any, NamedTuple

import redis
from pydantic import ValidationError

from app.kit import once
from app.machines import hardware, placement
from app.machines.hardware import Machine
from app.machines.placement import Resources
from app.queue import PREFIX, get_redis
from app.settings import get_settings

FADES_SECONDS = 30
REPEAT_SECONDS = 10
MACHINES = f"{PREFIX}machines"
LAUNCHER = f"{PREFIX}launcher"
FORGOTTEN_SECONDS = 7 * 86_400
"""A silent training machine is still planned with for this long if there is no other: its worker may only be restarting."""


class Worker(NamedTuple):
    queue: str
    name: str
    up_seconds: float
    silent_seconds: float


def clock() -> float:
    """Seconds since 1970 by Redis: those of two machines may differ by hours."""
    seconds_and_microseconds: Any = get_redis().time()
    return float(seconds_and_microseconds[0] + seconds_and_microseconds[1] / 1e6)


def say_alive(queue: str, up_seconds: float, *, name: str | None = None) -> None:
    """One heartbeat of this process, for `queue`: train, evaluate, data, import, export, generate or relay."""
    name = name or f"{socket.gethostname()}:{os.getpid()}"
    word = json.dumps({"queue": queue, "name": name, "up_seconds": up_seconds, "seen_at": clock()})
    get_redis().set(f"{PREFIX}alive:{queue}:{name}", word, ex=FADES_SECONDS)


def keep_saying(queue: str) -> threading.Event:
    """Send heartbeats every ten seconds from a thread, until the returned event is set. Errors of Redis do not stop it."""
    stop, began = threading.Event(), time.monotonic()

    def talk() -> None:
        while True:
            with contextlib.suppress(redis.RedisError):  # a refusal too, as while its disk is full
                say_alive(queue, time.monotonic() - began)
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
        now = clock()
    except (redis.RedisError, RuntimeError):
        return []
    return sorted(Worker(w["queue"], w["name"], w.get("up_seconds", 0.0), max(0.0, now - w["seen_at"])) for w in words)


# The machine that trains ----------------------------------------------------------------------------------------------


def say_machine(here: Machine | None = None, *, name: str | None = None) -> None:
    """Publish the hardware and measured speeds of the machine that this worker's jobs train on, for their estimates."""
    found = {"seen_at": clock(), "machine": (here or hardware.trained_on()).model_dump(mode="json")}
    get_redis().hset(MACHINES, name or machine_name(), json.dumps(found))


def machine_name() -> str:
    """This machine as its train workers see it: the host, with the GPUs that they are confined to and their labels, where there are any."""
    seen = os.environ.get("HIP_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES"))
    parts = [f"GPU {seen}"] if seen else []
    return " ".join([socket.gethostname(), *(f"[{part}]" for part in (*parts, *get_settings().worker_labels))])


def training_machine(asked: Resources | None = None, device: str = "auto") -> Machine:
    """The machine that a job is planned for: one that trains, and has what is asked for. Of several, the weakest, since any may take the job.
    This one where none was ever heard of, and while Redis is unreachable."""
    return training_machines(asked, device)[0]


def training_machines(asked: Resources | None = None, device: str = "auto") -> list[Machine]:
    """All that may take such a job, from the weakest to the strongest; all there are where none has what is asked for."""
    there = once.of("the machines that train", _training_machines)
    found = placement.weakest(placement.matching(there, asked, device) or there)
    if asked is None or (asked.gpus, asked.machines) == (None, None):
        return found
    several = asked.machines or 1
    return [machine.model_copy(update={"processes": (asked.gpus or machine.processes) * several}) for machine in found]


def _training_machines() -> list[Machine]:
    heard = machines()
    newest = min((silent for _, silent, _ in heard), default=FORGOTTEN_SECONDS)
    there = [found for _, silent, found in heard if silent - newest < FADES_SECONDS]
    return there if there and newest < FORGOTTEN_SECONDS else [hardware.this_machine()]


def capacities() -> list[placement.Capacity]:
    """What the train workers have that were heard of lately."""
    return [placement.capacity_of(host, machine) for host, silent, machine in machines() if silent < FADES_SECONDS]


def machines() -> list[tuple[str, float, Machine]]:
    """(host, seconds since it was heard of, machine) of all that ever sent a message; those of another version of the studio are
    skipped."""
    found = []
    with contextlib.suppress(redis.RedisError, RuntimeError):
        heard: dict[bytes, bytes] = get_redis().hgetall(MACHINES)  # type: ignore[assignment]
        now = clock()
        for host, word in heard.items():
            with contextlib.suppress(ValidationError, ValueError, KeyError, TypeError):
                said = json.loads(word)
                found.append((host.decode(), max(0.0, now - float(said["seen_at"])), Machine.model_validate(said["machine"])))
    return sorted(found, key=lambda one: one[:2])


# The engine that jobs are handed over to --------------------------------------------------------------------------------


def tell_launcher(words: str) -> None:
    """Publish why an engine takes no job now, for the pages of those that wait; nothing where it does. Errors of Redis do not matter."""
    with contextlib.suppress(redis.RedisError, RuntimeError):
        if words:
            get_redis().set(LAUNCHER, words, ex=FADES_SECONDS)
        else:
            get_redis().delete(LAUNCHER)


def launcher_words() -> str | None:
    """Why an engine takes no job now, where one has said so in the last half minute."""
    try:
        said: Any = get_redis().get(LAUNCHER)
    except (redis.RedisError, RuntimeError):
        return None
    return said.decode() if said else None
