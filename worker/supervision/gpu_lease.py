"""A lease on each GPU that a trainer uses, so that two never share one: a lock on a file named after its UUID.

The trainer inherits the open file, so the kernel keeps the lock until the last process of a job is gone, and frees it whatever ends
that. Workers of one machine may all see all of its GPUs: each job takes as many as it needs of those that are free.
"""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass, field
from pathlib import Path

from app.machines.gpus import selection, visible_gpus
from app.settings import get_settings


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


def take(count: int) -> GpuLease | None:
    """Lease `count` of the GPUs that this process may use; None where fewer are free. Of a machine that has fewer nothing is leased: its
    jobs fail, and say why."""
    known = visible_gpus()
    lease = GpuLease()
    if len(known) < count:
        return lease
    folder = get_settings().folder("locks")
    for uuid in known:
        if (file := _locked(folder / f"{uuid.replace('/', '-')}.lock")) is not None:
            lease.gpus.append(uuid)
            lease.files.append(file)
        if len(lease.gpus) == count:
            return lease
    lease.release()
    return None


def _locked(path: Path) -> int | None:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    return file
