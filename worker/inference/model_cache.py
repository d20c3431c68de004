"""A few loaded encoders and classifiers, which answer in one pass and need no lane: the last used stay, like the lanes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from app.inference.residency import LoadedModelInfo

T = TypeVar("T")


@dataclass
class _Entry(Generic[T]):
    value: T
    bytes: int
    used_at: float = field(default_factory=time.monotonic)


class ModelCache(Generic[T]):
    """At most `most` values by key. `module` finds the weights in one; the first part of a key is the model's folder."""

    def __init__(self, most: int, module: Callable[[T], torch.nn.Module]) -> None:
        self.most, self.module = most, module
        self.loaded: dict[tuple[str, ...], _Entry[T]] = {}  # in order of last use
        self._lock, self._loading = threading.Lock(), threading.Lock()
        ALL.append(self)

    def get(self, key: tuple[str, ...], load: Callable[[], T]) -> T:
        """The value of `key`, loaded when it is not there. One is loaded at a time; the others are served meanwhile."""
        if (found := self._known(key)) is not None:
            return found.value
        with self._loading:
            if (found := self._known(key)) is None:
                value = load()
                found = _Entry(value, sum(p.nbytes for p in self.module(value).parameters()))
            with self._lock:
                self.loaded[key] = found
                while len(self.loaded) > self.most:
                    self.loaded.pop(next(iter(self.loaded)))
            return found.value

    def _known(self, key: tuple[str, ...]) -> _Entry[T] | None:
        with self._lock:
            found = self.loaded.pop(key, None)
            if found is not None:
                found.used_at = time.monotonic()
                self.loaded[key] = found
            return found

    def put_away(self, before: float) -> int:
        """Let go of what was last used before this moment of the monotonic clock; how many. Who uses one now holds it himself."""
        with self._lock:
            old = [key for key, one in self.loaded.items() if one.used_at < before]
            for key in old:
                del self.loaded[key]
        return len(old)

    def ready(self) -> list[LoadedModelInfo]:
        now = time.monotonic()
        with self._lock:
            return [LoadedModelInfo(path=key[0], bytes=one.bytes, idle_seconds=now - one.used_at) for key, one in self.loaded.items()]


ALL: list[ModelCache[Any]] = []


def memory() -> int:
    """Bytes of all of them."""
    return sum(ready.bytes for kept in ALL for ready in kept.ready())
