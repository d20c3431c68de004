"""A lease on each GPU that a trainer uses, so that two never share one: a lock on a file named after its UUID.

The trainer inherits the open file, so the kernel keeps the lock until the last process of a job is gone, and frees it whatever ends
that. Workers of one machine may all see all of its GPUs: each job takes as many as it needs of those that are free.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from dataclasses import dataclass, field

from app.jobs import lifecycle
from app.machines.gpus import GpuCard, selection, visible_cards
from app.machines.hardware import this_machine
from app.settings import get_settings
from app.tables import Job


@dataclass
class GpuLease:
    """`gpus` are UUIDs; none where nothing is known of this machine's. `files` are open."""

    gpus: list[str] = field(default_factory=list)
    files: list[int] = field(default_factory=list)

    def environment(self) -> dict[str, str]:
        return selection(self.gpus) if self.gpus else {}

    def release(self) -> None:
        while self.files:
            os.close(self.files.pop())


def of_job(job: Job) -> GpuLease | None:
    """The GPUs of a job, none for one that trains on the CPU; None where others use them."""
    needs = lifecycle.needs_of(job)
    if not this_machine().cuda or needs.gpu_bytes is None:
        return GpuLease()
    return take(needs.num_gpus or get_settings().gpus_per_job, needs.suits)


def take(count: int, suits: Callable[[GpuCard], bool] = lambda _: True) -> GpuLease | None:
    """Lease `count` of the GPUs that this process may use and that suit, those with least memory first; None where fewer are free. Of a
    machine that has fewer nothing is leased: its jobs fail, and say why."""
    known = visible_cards()
    lease = GpuLease()
    if len(known) < count:
        return lease
    for card in sorted(filter(suits, known), key=lambda one: one.memory_bytes):
        if (file := _locked(card)) is not None:
            lease.gpus.append(card.uuid)
            lease.files.append(file)
        if len(lease.gpus) == count:
            return lease
    lease.release()
    return None


def free_gpus() -> list[GpuCard]:
    """The GPUs that this process may use and that nobody has leased now."""
    found = []
    for card in visible_cards():
        if (file := _locked(card)) is not None:
            os.close(file)
            found.append(card)
    return found


def _locked(card: GpuCard) -> int | None:
    path = get_settings().folder("locks") / f"{card.uuid.replace('/', '-')}.lock"
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    return file
