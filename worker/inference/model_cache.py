"""A small LRU cache of loaded encoders and classifiers, which answer in one forward pass and need no engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import torch

from app.inference.residency import LoadedModelInfo

T = TypeVar("T")


@dataclass
class _Entry(Generic[T]):
    value: T
    bytes: int
    used_at: float = field(default_factory=time.monotonic)


class ModelCache(Generic[T]):
    """At most `most` values by key. `module` gets the weights of a value; the first part of a key is the model's folder."""

    def __init__(self, most: int, module: Callable[[T], torch.nn.Module]) -> None:
        self.most, self.module = most, module
        self.loaded: dict[tuple[str, ...], _Entry[T]] = {}  # in order of last use
        self._lock, self._loading = threading.Lock(), threading.Lock()
        ALL.append(self)

    def get(self, key: tuple[str, ...], load: Callable[[], T]) -> T:
        """The value of `key`, loaded on a miss. One value is loaded at a time; hits are served meanwhile."""
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

    def evict(self, before: float) -> int:
        """Evict values last used before this time of the monotonic clock; returns how many. A value in use is kept alive by its user."""
        with self._lock:
            old = [key for key, one in self.loaded.items() if one.used_at < before]
            for key in old:
                del self.loaded[key]
        return len(old)

    def ready(self) -> list[LoadedModelInfo]:
        now = time.monotonic()
        with self._lock:
            return [LoadedModelInfo(path=key[0], bytes=one.bytes, idle_seconds=now - one.used_at) for key, one in self.loaded.items()]


class Evictable(Protocol):
    """What is loaded besides the models of the engine."""

    def evict(self, before: float) -> int: ...

    def ready(self) -> list[LoadedModelInfo]: ...


ALL: list[Evictable] = []


def memory() -> int:
    """Bytes of all cached values."""
    return sum(ready.bytes for kept in ALL for ready in kept.ready())
