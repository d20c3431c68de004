"""Answers that hold while one thing is worked out, asked for once however many places need them.

with once.remembered():      # a form that tries twenty methods on one machine and one dataset
    …                        # once.of(("machine",), ask) asks the first time
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

T = TypeVar("T")
_known: ContextVar[dict[Hashable, Any] | None] = ContextVar("known", default=None)


@contextmanager
def remembered() -> Iterator[None]:
    """Within it every question is asked once; within another it adds nothing."""
    if _known.get() is not None:
        yield
        return
    token = _known.set({})
    try:
        yield
    finally:
        _known.reset(token)


def of(question: Hashable, ask: Callable[[], T]) -> T:
    """The answer to a question; outside of `remembered` it is asked each time. What is raised is not remembered."""
    known = _known.get()
    if known is None:
        return ask()
    if question not in known:
        known[question] = ask()
    found: T = known[question]
    return found
