"""Ends open event streams whose key or browser session was revoked, signed out or has expired.

One query every few seconds checks all streams of the process, however many there are.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from app.db import transaction
from app.web.auth import Pass, still_good

log = logging.getLogger(__name__)
LOOK_SECONDS = 3.0


class Doorkeeper:
    """The credentials of the open streams of one event loop, and a callback that ends each stream."""

    def __init__(self) -> None:
        self.streams: defaultdict[Pass, set[Callable[[], object]]] = defaultdict(set)
        self.task: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def watching(self, scope: Mapping[str, Any], end: Callable[[], object]) -> Iterator[None]:
        """Call `end` once when the credential of this request becomes invalid."""
        held: Pass | None = scope.get("state", {}).get("pass_")
        if held is None:
            yield
            return
        self.streams[held].add(end)
        if self.task is None:
            self.task = asyncio.create_task(self._look(), name="revocations")
        try:
            yield
        finally:
            self.streams[held].discard(end)
            if not self.streams[held]:
                del self.streams[held]
            if not self.streams and self.task is not None:
                self.task.cancel()
                self.task = None

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                good = await asyncio.to_thread(_good, list(self.streams))
            except Exception as error:  # nothing can be checked right now: streams stay open until it can
                log.warning("Open streams cannot be checked just now: %s", error)
                continue
            for held in set(self.streams) - good:
                for end in list(self.streams.get(held, ())):
                    end()


def _good(passes: list[Pass]) -> set[Pass]:
    with transaction() as session:
        return still_good(session, passes)


_doorkeepers: WeakKeyDictionary[asyncio.AbstractEventLoop, Doorkeeper] = WeakKeyDictionary()


def doorkeeper() -> Doorkeeper:
    """The doorkeeper of the running event loop."""
    return _doorkeepers.setdefault(asyncio.get_running_loop(), Doorkeeper())
