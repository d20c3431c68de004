"""Long work that is no training step: it tells how far it is, so that a page can show it and nobody takes its silence for a hang.

Such work is a generator of shares, 0 to 1, that returns what it found; between two shares there is at most one pass over the model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from typing import TypeVar

from app import events

T = TypeVar("T")
EVERY_SECONDS = 15.0
"""A supervisor waits minutes before it thinks that a trainer hangs; a person who watches a page waits less."""


class ProgressReporter:
    """Passes the shares of several pieces of work, one after the other, on as events about one thing."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.told_at = time.monotonic()

    def __call__(self, work: Generator[float, None, T], first: float = 0.0, last: float = 1.0) -> Generator[events.TaskProgress, None, T]:
        """Do `work`, which is the part from `first` to `last` of the whole; what it found."""
        while True:
            try:
                share = next(work)
            except StopIteration as done:
                return done.value
            yield from self.at(first + (last - first) * share)

    def at(self, share: float) -> Iterator[events.TaskProgress]:
        """The event of this share of the whole, unless one was told a moment ago."""
        if time.monotonic() - self.told_at >= EVERY_SECONDS:
            self.told_at = time.monotonic()
            yield events.TaskProgress(what=self.what, share=round(share, 4))


def drained(work: Generator[float, None, T], progress: Callable[[float], None] | None = None) -> T:
    """What `work` finds, for those who are asked by nobody how far it is, or who pass the shares to `progress`."""
    while True:
        try:
            share = next(work)
        except StopIteration as done:
            return done.value
        if progress:
            progress(share)
