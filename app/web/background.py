"""Work that the web process does in the background, for as long as it runs: it asks the application itself, as a person would.

Each kind of work is on rows of a table under a lease, so with several web processes each row is held by one of them, and when that one
dies another goes on with what is not done.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from fastapi import FastAPI
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from app.db import transaction
from app.errors import StudioError

log = logging.getLogger("luthier.background")

ROWS_AT_ONCE = 4
"""Rows of each kind that one process holds."""
REQUESTS_AT_ONCE = 8
"""Requests under way of each kind, of all rows together."""
LOOK_SECONDS = 5.0
"""Polling interval, for rows that another process made or left."""
BEAT_SECONDS = 2.0
"""Pause between two heartbeats, each of which stores what was done since the last."""
T = TypeVar("T")
Item = TypeVar("Item")


class LeaseLost(Exception):
    """Another process holds the row, or it was deleted."""


class BackgroundAttempt(ABC):
    """One process's part of the work on a row."""

    def __init__(self, app: FastAPI, row: Any, slots: asyncio.Semaphore) -> None:
        self.app, self.row, self.slots = app, row, slots
        self.ended = asyncio.Event()
        """Set once nothing more is to be sent: it was cancelled, or its time is over."""

    async def write(self, work: Callable[[Session], T]) -> T:
        """Run `work` in a transaction, in a thread."""
        return await run_in_threadpool(_in_transaction, work)

    def in_thread(self, work: Callable[[Session], T]) -> T:
        """The same in the thread that calls."""
        return _in_transaction(work)

    @abstractmethod
    async def through(self) -> None:
        """Do it. Raises LeaseLost, and StudioError for what cannot be done."""

    @abstractmethod
    async def store(self) -> None:
        """Renew the lease and store what was done since the last time. Raises LeaseLost."""

    @abstractmethod
    async def fail(self, code: str, message: str) -> None:
        """End the row with an error."""

    @abstractmethod
    async def release(self) -> None:
        """Let another process go on."""

    async def each(self, items: Iterable[Item], work: Callable[[Item], Coroutine[Any, Any, None]]) -> None:
        """Do `work` for each item, several at a time and with heartbeats meanwhile, until all are done or the work has ended."""
        rest = iter(items)
        pending: set[asyncio.Task[None]] = set()
        beaten = time.monotonic()
        try:
            while not self.ended.is_set():
                for item in islice(rest, REQUESTS_AT_ONCE - len(pending)):
                    pending.add(asyncio.create_task(work(item)))
                if not pending:
                    return
                finished, pending = await asyncio.wait(pending, timeout=BEAT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                for task in finished:
                    task.result()
                if time.monotonic() - beaten > BEAT_SECONDS:
                    beaten = time.monotonic()
                    await self.store()
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)

    async def storing(self, work: asyncio.Future[T]) -> T:
        """The result of something that takes a while, with heartbeats meanwhile."""
        while not (await asyncio.wait({work}, timeout=BEAT_SECONDS))[0]:
            await self.store()
        return work.result()


def _in_transaction(work: Callable[[Session], T]) -> T:
    with transaction() as session:
        return work(session)


@dataclass(frozen=True)
class WorkKind:
    """What is done on the rows of one table. `claim` returns the next row, now held by the caller; None without any."""

    name: str
    claim: Callable[[Session], Any]
    attempt: type[BackgroundAttempt]


def wake(app: FastAPI) -> None:
    """Have the runner of a started application look for work now. From any thread."""
    if (runner := getattr(app.state, "background", None)) is not None:
        runner.loop.call_soon_threadsafe(runner.told.set)


class BackgroundRunner:
    """Takes rows that wait, of every kind, and works on them until it is cancelled."""

    def __init__(self, app: FastAPI, kinds: Sequence[WorkKind]) -> None:
        self.app, self.kinds = app, kinds
        self.running: dict[str, set[asyncio.Task[None]]] = {kind.name: set() for kind in kinds}
        self.slots = {kind.name: asyncio.Semaphore(REQUESTS_AT_ONCE) for kind in kinds}
        self.loop = asyncio.get_running_loop()
        self.told = asyncio.Event()

    async def run(self) -> None:
        try:
            while True:
                self.told.clear()
                if not any([await self._take(kind) for kind in self.kinds]):
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self.told.wait(), LOOK_SECONDS)
        finally:
            tasks = [task for tasks in self.running.values() for task in tasks]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _take(self, kind: WorkKind) -> bool:
        """Begin with the next row of a kind, where there is one and room for it."""
        tasks = self.running[kind.name]
        if len(tasks) >= ROWS_AT_ONCE:
            return False
        row = None
        with contextlib.suppress(DBAPIError, StudioError, OSError):  # the database is away: ask again
            row = await run_in_threadpool(_in_transaction, kind.claim)
        if row is None:
            return False
        task = asyncio.create_task(self._work(kind, row))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        task.add_done_callback(lambda _: self.told.set())
        return True

    async def _work(self, kind: WorkKind, row: Any) -> None:
        attempt = kind.attempt(self.app, row, self.slots[kind.name])
        try:
            await attempt.through()
        except LeaseLost:
            log.info("%s %s is held by another process", kind.name, row.id)
        except StudioError as fault:
            await attempt.fail(fault.code or "failed", f"{fault.message} {fault.hint}".strip())
        except (DBAPIError, OSError):
            log.warning("%s %s waits for the end of its lease: the database or the disk failed", kind.name, row.id, exc_info=True)
        except asyncio.CancelledError:
            with contextlib.suppress(Exception):  # what is not released waits for the end of its lease
                await asyncio.shield(_leave(attempt))
            raise
        except Exception:
            log.exception("%s %s failed", kind.name, row.id)
            await attempt.fail("internal_error", "The studio could not do it; its log says why.")


async def _leave(attempt: BackgroundAttempt) -> None:
    await attempt.store()
    await attempt.release()
