"""What a launcher is: where the attempt at a job that is next takes place.

    claims.choose ─▶ attempts ─┬─ here: this worker claims the job and starts its trainer (`local.py`)
                               └─ elsewhere: the job is handed over to an engine, which finds a machine or makes one, and starts
                                  `worker.launchers.carry` there; that claims it, and is to the job what a worker is (`_elsewhere.py`)

The seam is before the claim and not behind it: a lease, its fence, heartbeats, requests to stop, events, checkpoints and logs are then
those of any attempt, wherever it runs; an engine that is away leaves jobs queued; and a machine that is lost is what it always was, a
lease that runs out.
"""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar


class Launcher(ABC):
    """Takes turns for a train or evaluate worker."""

    name: ClassVar[str]

    @abstractmethod
    def check(self, queues: Collection[str]) -> None:
        """At the start of a worker that reads these queues. Raises BadField for what the launcher cannot do for it."""

    @abstractmethod
    def turn(self, key: uuid.UUID, message: Mapping[str, Any] | None, going_down: Callable[[], bool], queues: Collection[str]) -> None:
        """One turn of this worker, for a message that named `key`."""
