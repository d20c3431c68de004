"""Jobs that an engine finds machines for: what is next is handed over, and what became of it is asked before each turn.

An engine has a queue of its own, in its own order. So only a few jobs wait there at a time (LUTHIER_LAUNCHER_WAITING), each handed over
when it is next here. Handing over changes nothing in the database: the job stays queued until the process that the engine starts
claims it. It is named after the fence that the claim will have, so that the same attempt is handed over once, however many workers
ask; and where the process ends without claiming it, it is handed over again under a further number, later each time.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import re
import time
import uuid
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session

from app import events, limits
from app.db import transaction
from app.errors import BadField, StudioError
from app.jobs import lifecycle
from app.kit.humanize import plural
from app.machines import hardware, heartbeats, placement
from app.machines.placement import Capacity, Needs
from app.queue import ROUTES, TRAIN
from app.settings import get_settings
from app.storage import sweeping
from app.tables import Job
from worker.evaluation import train_turn
from worker.launchers._base import Launcher
from worker.supervision import gpu_lease
from worker.supervision.claiming import ClaimOutcome

log = logging.getLogger(__name__)

AGAIN_SECONDS = 15.0
"""Pause before a job is handed over again whose process ended without claiming it; twice as long each time."""
MAX_PAUSE_SECONDS = 1800.0
SAID_CHARACTERS = 600
GATHER_SECONDS = 900
"""How long a process waits for the others of a job on several machines: the engine may have to make a machine first."""

HANDED_ON = (
    "LUTHIER_BEAT_SECONDS", "LUTHIER_CONFINEMENT", "LUTHIER_CUDA_GRAPHS", "LUTHIER_GPUS_PER_JOB", "LUTHIER_GPU_MEMORY_BYTES", "LUTHIER_KEEP_CHECKPOINTS",
    "LUTHIER_KERNELS", "LUTHIER_LABELS", "LUTHIER_LEASE_SECONDS", "LUTHIER_LOG_FORMAT", "LUTHIER_LOG_LEVEL", "LUTHIER_OFFLINE", "LUTHIER_STOP_GRACE_SECONDS",
)  # fmt: skip
"""Settings of this worker that the attempts it hands over have too. Addresses and keys are not among them: the engine shows these to
whoever may look at it, so its machines have them in their own environment."""


HandedState = Literal["waits", "runs", "ended"]


class HandedOver(NamedTuple):
    """What an engine says of a process that it was asked for."""

    name: str
    state: HandedState
    said: str = ""
    """Why it waits, or how it ended."""
    ended_at: float = 0.0
    """Seconds since 1970; 0 where it has not ended."""

    @property
    def of(self) -> tuple[uuid.UUID, int]:
        """(job, fence that its claim has)."""
        _, _, job, fence, _ = self.name.split("-")
        return uuid.UUID(hex=job), int(fence)


@functools.lru_cache(maxsize=8)
def prefix(url: str | None) -> str:
    """How the names of this studio's processes begin: several studios may use one engine. `url` is that of the database."""
    with transaction() as session:
        return f"luthier-{hashlib.sha256(sweeping.identity(session).encode()).hexdigest()[:8]}-"


def name_of(job_id: uuid.UUID, fence: int, number: int) -> str:
    """At most 63 characters, small letters, digits and hyphens, as names are in Kubernetes."""
    return f"{prefix(get_settings().database_url)}{job_id.hex}-{fence}-{number}"


def is_ours(name: str) -> bool:
    return re.fullmatch(rf"{prefix(get_settings().database_url)}[0-9a-f]{{32}}-\d+-\d+", name) is not None


@dataclass(frozen=True)
class HandOver:
    """A job that is to be handed over: its name there, and what its process needs."""

    job_id: uuid.UUID
    name: str
    needs: Needs
    processes: int
    on_gpu: bool
    lease: gpu_lease.GpuLease = field(default_factory=gpu_lease.GpuLease)
    """Nothing of this machine."""

    @property
    def command(self) -> list[str]:
        return [get_settings().launcher_python, "-m", "worker.launchers.carry", "--job", str(self.job_id)]

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in HANDED_ON if name in os.environ}
        return kept | {"LUTHIER_LAUNCHER": "local", "LUTHIER_GATHER_SECONDS": str(GATHER_SECONDS), "PYTHONUNBUFFERED": "1"}

    @property
    def memory_bytes(self) -> int:
        """Memory of the machine that it asks for; 0 where its estimate says nothing."""
        return 0 if self.on_gpu else (self.needs.cpu_bytes or 0) * self.processes


class EngineLauncher(Launcher):
    """A launcher that asks an engine. What the engine is asked is `handed`, `hand_over` and `take_back`; each raises StudioError where it
    is away or refuses."""

    title: ClassVar[str]

    @abstractmethod
    def handed(self) -> Sequence[HandedOver]:
        """All that this studio asked it for and it has not forgotten (`is_ours`)."""

    @abstractmethod
    def hand_over(self, work: HandOver) -> None:
        """Ask for the process. Nothing happens where it was asked for by this name before."""

    @abstractmethod
    def take_back(self, name: str) -> None:
        """Have it stopped, or never started."""

    def check(self, queues: Collection[str]) -> None:
        if set(queues) != {ROUTES[TRAIN]}:
            raise BadField(
                f"A worker with LUTHIER_LAUNCHER={self.name} hands jobs over and does nothing itself, and was started with {', '.join(sorted(queues))}.",
                hint="Start it with -Q train, and others for the other queues.",
                param="launcher",
            )

    def turn(self, key: uuid.UUID, message: Mapping[str, Any] | None, going_down: Callable[[], bool], queues: Collection[str]) -> None:
        try:
            there = self._look()
            waiting = sum(one.state == "waits" for one in there)
            if waiting < get_settings().launcher_waiting:
                attempts = {"jobs": train_turn.Takes(HandingOver(self, there).claim, self._carry_out)}
                train_turn.take(key, message, going_down, attempts, train_turn.Room(capacity, capacity))
            heartbeats.tell_launcher("")
        except StudioError as error:  # what waits is announced again
            log.warning("%s: %s %s", self.title, error.message, error.hint)
            heartbeats.tell_launcher(f"{self.title} cannot take it now. {error.message} {error.hint}".strip())

    def _look(self) -> list[HandedOver]:
        """What the engine has; what waits there and is wanted no longer is taken back."""
        there = list(self.handed())
        waiting = {one.of: one for one in there if one.state == "waits"}
        if waiting:
            with transaction() as session:
                query = select(Job.id, Job.fence, Job.status).where(Job.id.in_([job_id for job_id, _ in waiting]), Job.deleted_at.is_(None))
                rows = session.execute(query.where(Job.status.in_(("queued", "running")))).all()
            # One that has begun since the engine was asked is running under the fence that it was to have.
            wanted = {(job_id, fence + (status == "queued")) for job_id, fence, status in rows}
            for of in waiting.keys() - wanted:
                self.take_back(waiting[of].name)
                there.remove(waiting[of])
        return there

    def _carry_out(self, work: HandOver) -> None:
        log.info("Job %s is handed over to %s as %s.", work.job_id, self.title, work.name)
        self.hand_over(work)


class HandingOver:
    """How jobs are claimed for an engine in one turn: not at all. The row is locked while it is looked at, and stays as it is."""

    def __init__(self, launcher: EngineLauncher, there: Sequence[HandedOver]) -> None:
        self.launcher = launcher
        self.there: dict[tuple[uuid.UUID, int], list[HandedOver]] = {}
        for one in there:
            self.there.setdefault(one.of, []).append(one)

    def claim(self, session: Session, key: uuid.UUID, going_down: Callable[[], bool]) -> HandOver | ClaimOutcome:
        if going_down():
            return ClaimOutcome.LEFT
        job = session.get(Job, key)
        if job is None:
            return ClaimOutcome.GONE
        before = self.there.get((key, job.fence + 1), [])
        begun = sum(one.state != "ended" for one in before)  # of a job on several machines each has a process, which meet there
        if begun >= (job.num_machines or 1) or self._too_soon(session, job, before) or self._at_limit(session, job):
            return ClaimOutcome.GIVEN
        needs = lifecycle.needs_of(job)
        return HandOver(
            key,
            name_of(key, job.fence + 1, len(before)),
            needs,
            needs.num_gpus or get_settings().gpus_per_job,
            on_gpu=capacity().cuda and needs.gpu_bytes is not None,
        )

    def _too_soon(self, session: Session, job: Job, before: list[HandedOver]) -> bool:
        """Whether its process ended just now without having claimed it. The job's log says how."""
        before = [one for one in before if one.state == "ended"]
        if not before:
            return False
        for one in before:
            words = f"{self.launcher.title} could not begin with it ({plural(len(before), 'attempt')}): {one.said[-SAID_CHARACTERS:] or 'it does not say why'}"
            said = events.Log(level="warn", message=words)
            lifecycle.record_event(session, job.id, job.attempt, said, uuid.uuid5(job.id, one.name))
        pause = min(AGAIN_SECONDS * 2 ** len(before), MAX_PAUSE_SECONDS)
        return time.time() - max(one.ended_at for one in before) < pause

    def _at_limit(self, session: Session, job: Job) -> bool:
        """Whether as much of its person or project runs, or will as soon as the engine starts it, as is allowed."""
        ahead = [key for (key, _), those in self.there.items() if key != job.id and any(one.state != "ended" for one in those)]
        mine = [(Job.owner_id, limits.running_limits(session, "person").get(job.owner_id))]
        mine.append((Job.project_id, limits.running_limits(session, "project").get(job.project_id)))
        for column, most in mine:
            if most is None:
                continue
            own = column == (job.owner_id if column is Job.owner_id else job.project_id)
            query = select(Job.id).where(own, (Job.status == "running") | (Job.id.in_(ahead) & (Job.status == "queued")))
            if len(session.scalars(query).all()) >= most:
                return True
        return False


def capacity() -> Capacity:
    """One of the machines that an engine starts jobs on: whatever fits it may be handed over."""
    return placement.capacity_of(heartbeats.machine_name(), hardware.trained_on())
