"""A cache that lives as long as one computation, such as the rendering of a form.

with once.remembered():      # a form that tries twenty methods on one machine and one dataset
    …                        # once.of(("machine",), ask) computes it once
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
    """Cache the values of `of` until the end of the block. A nested block uses the cache of the outer one."""
    if _known.get() is not None:
        yield
        return
    token = _known.set({})
    try:
        yield
    finally:
        _known.reset(token)


def of(question: Hashable, ask: Callable[[], T]) -> T:
    """The value for the key `question`, computed by `ask`: once within `remembered`, each time outside of it. Exceptions are not cached."""
    known = _known.get()
    if known is None:
        return ask()
    if question not in known:
        known[question] = ask()
    found: T = known[question]
    return found
