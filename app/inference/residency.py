"""Which models are loaded, and the rule by which they are evicted.

A generate worker publishes every second or two which models it has loaded; a train worker how much memory its job takes. Both are
Redis keys that expire, so nothing stale remains of a worker that dies:

    luthier:loaded:<worker>          the models that a generate worker has loaded
    luthier:room:<machine>:<job>      the bytes a job of this machine takes while it trains
    luthier:no_room:<evaluation>      an evaluation that had no room beside what trains
"""

from __future__ import annotations

import contextlib
import functools
import os
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import redis
from pydantic import BaseModel
from sqlalchemy import select
from sqlalchemy.orm import Session

from app.languages import gettext, localized
from app.machines.gpus import visible_gpus
from app.machines.hardware import this_machine
from app.models import service as models
from app.queue import PREFIX, get_redis
from app.settings import get_settings
from app.tables import JSON, Model, User

FADES_SECONDS = 15
ROOM_SECONDS = 60
"""Expiry of a job's key, renewed with each of its heartbeats."""


class LoadedModelInfo(BaseModel):
    """One loaded model: its folder, the folders of the adapters that share its weights, and how it is used."""

    path: str
    adapters: list[str] = []
    bytes: int
    answering: int = 0
    idle_seconds: float = 0


class WorkerResidency(BaseModel):
    """What one generate worker has loaded. `limit_bytes` is what it may take now; `training_bytes` what training jobs take."""

    device: str
    used_bytes: int
    limit_bytes: int
    training_bytes: int
    models: list[LoadedModelInfo]


class ShownModel(NamedTuple):
    """A loaded model with its name on the page; `model` is None for one of another person."""

    model: Model | None
    tuned: list[Model]
    ready: LoadedModelInfo


# The worker's side ----------------------------------------------------------------------------------------------------


def say(worker: str, standing: WorkerResidency) -> None:
    get_redis().set(f"{PREFIX}loaded:{worker}", standing.model_dump_json(), ex=FADES_SECONDS)


@functools.cache
def machine_id() -> str:
    """The boot id of the running kernel: shared by all processes and containers of a machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _gpus(count: int) -> list[str]:
    """The GPUs that `count` processes of a job started here use: UUIDs, or where none are told the names of CUDA_VISIBLE_DEVICES."""
    if known := visible_gpus():
        return list(known[:count])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").replace(" ", "")
    return visible.split(",")[:count] if visible else [str(number) for number in range(count)]


def ask_room(job_id: uuid.UUID, size_bytes: int, device: str = "auto", gpus: Sequence[str] = ()) -> None:
    """Have idle models of this machine evicted while a job trains that needs their memory on `device`: on these `gpus`, or on the first
    ones that it sees. Repeat it while it trains."""
    where = f"cuda:{','.join(gpus or _gpus(get_settings().gpus_per_job))}" if this_machine().cuda and device != "cpu" else "cpu"
    with contextlib.suppress(redis.RedisError, RuntimeError):  # an unreachable broker is no reason not to train
        get_redis().set(_room(job_id), f"{size_bytes} {where}", ex=ROOM_SECONDS)


def give_room_back(job_id: uuid.UUID) -> None:
    with contextlib.suppress(redis.RedisError, RuntimeError):
        get_redis().delete(_room(job_id))


def room_asked(cuda: bool) -> int:
    """Bytes that the jobs of this machine take on the device this process uses. A job on a GPU with another kind of name, a number where
    ours is a UUID, may be on the same one and is counted."""
    wire, total = get_redis(), 0
    mine = next(iter(_gpus(1)), "")
    keys = list(wire.scan_iter(match=f"{PREFIX}room:{machine_id()}:*", count=500))
    for word in wire.mget(keys) if keys else []:
        said = word or b"0 cpu"
        assert isinstance(said, bytes)  # the connection decodes nothing
        size, _, where = said.decode().partition(" ")
        kind, _, gpus = where.partition(":")
        theirs = gpus.split(",")
        if cuda == (kind == "cuda") and (not cuda or mine in theirs or mine.isdigit() != theirs[0].isdigit()):
            total += int(size)
    return total


def say_no_room(evaluation_id: uuid.UUID) -> None:
    """An evaluate worker passed it over, for what trains leaves too little memory. Repeat it at every look."""
    with contextlib.suppress(redis.RedisError, RuntimeError):
        get_redis().set(_no_room(evaluation_id), b"1", ex=ROOM_SECONDS)


def without_room(evaluation_ids: Iterable[uuid.UUID]) -> set[uuid.UUID]:
    """Those that were passed over within the last minute; none while Redis is unreachable."""
    asked = list(evaluation_ids)
    try:
        words = get_redis().mget([_no_room(key) for key in asked]) if asked else []
    except (redis.RedisError, RuntimeError):
        return set()
    return {key for key, word in zip(asked, words, strict=True) if word}


def _no_room(evaluation_id: uuid.UUID) -> str:
    return f"{PREFIX}no_room:{evaluation_id.hex}"


def _room(job_id: uuid.UUID) -> str:
    return f"{PREFIX}room:{machine_id()}:{job_id.hex}"


# The reader's side ----------------------------------------------------------------------------------------------------


def rule() -> str:
    """The rule of loading and eviction, in words for the pages."""
    minutes = get_settings().generate_idle_seconds / 60
    return gettext(
        "Loaded at the first request; unloaded after %(minutes)s min idle, when another model needs the memory, or while a run "
        "that trains on the same machine needs it. A model with an active request finishes it first.",
        minutes=localized(f"{minutes:g}"),
    )


def everyone() -> list[WorkerResidency]:
    """What every generate worker has loaded; empty when Redis is unreachable."""
    try:
        wire = get_redis()
        keys = sorted(wire.scan_iter(match=f"{PREFIX}loaded:*", count=500))
        return [WorkerResidency.model_validate_json(word) for word in (wire.mget(keys) if keys else []) if word]
    except (redis.RedisError, RuntimeError):
        return []


def shown(session: Session, user: User, standing: WorkerResidency) -> list[ShownModel]:
    """The models of one worker with the names that this person may see, last used first."""
    by_path: dict[str, list[Model]] = {}
    loaded = {path for ready in standing.models for path in (ready.path, *ready.adapters)}
    for model in session.scalars(select(Model).where(models.visible(user), Model.path.in_(loaded)).order_by(Model.created_at, Model.id)):
        by_path.setdefault(str(model.path), []).append(model)
    found = []
    for ready in sorted(standing.models, key=lambda r: r.idle_seconds):
        named = by_path.get(ready.path, [])
        tuned = [model for path in dict.fromkeys(ready.adapters) for model in by_path.get(path, [])]  # a blend shares its path
        found.append(ShownModel(named[0] if named else None, tuned, ready))
    return found


def part(session: Session, user: User) -> JSON:
    """The data of the pages' template."""
    return {"standing": [(one, shown(session, user, one)) for one in everyone()], "rule": rule()}


def to_json(session: Session, user: User, standing: WorkerResidency) -> JSON:
    """One worker for the API; models of other people are counted but not named."""
    rows = [
        {
            "model": one.model.name if one.model else None,
            "tuned": [model.name for model in one.tuned],
            **one.ready.model_dump(include={"bytes", "answering", "idle_seconds"}),
        }
        for one in shown(session, user, standing)
    ]
    return {"object": "generator", **standing.model_dump(exclude={"models"}), "models": rows}
