"""Jobs train on this machine: the worker claims them, and their trainers are its children."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar

from worker.evaluation import train_turn
from worker.launchers._base import Launcher


class LocalLauncher(Launcher):
    name: ClassVar[str] = "local"

    def check(self, queues: Collection[str]) -> None:
        """Whatever queues it reads."""

    def turn(self, key: uuid.UUID, message: Mapping[str, Any] | None, going_down: Callable[[], bool], queues: Collection[str]) -> None:
        train_turn.take(key, message, going_down, train_turn.attempts_of(queues))
