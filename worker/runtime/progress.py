"""Progress events of long work other than training steps, so that a page can show it and no supervisor takes it for a hang.

Such work is a generator of fractions, 0 to 1, that returns its result; between two of them there is at most one forward pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from typing import TypeVar

from app import events

T = TypeVar("T")
EVERY_SECONDS = 15.0
"""Minimum interval between events. A supervisor waits minutes before it takes a trainer to hang; a person who watches waits less."""


class ProgressReporter:
    """Turns the fractions of several consecutive pieces of work into events of one task."""

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
    """The result of `work`, for callers without events; `progress` gets the fractions."""
    while True:
        try:
            share = next(work)
        except StopIteration as done:
            return done.value
        if progress:
            progress(share)
