"""Parts of files on their way to the object storage and from it, several at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")
Beat = Callable[[], object]
BEAT_SECONDS = 1.0


class Parallel:
    """So many threads that take a part each; `start` waits until one is free, so that no more parts are in memory, and raises what one of
    them met. Whoever waits sends heartbeats meanwhile: a storage that is away may keep a thread for a minute."""

    def __init__(self, beat: Beat, threads: int) -> None:
        self._beat, self._threads = beat, threads

    def __enter__(self) -> Parallel:
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="storage")
        self._free = threading.Semaphore(self._threads)
        self._error: BaseException | None = None
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def start(self, action: Callable[[], T]) -> Future[T]:
        while not self._free.acquire(timeout=BEAT_SECONDS):
            self._beat()
        self._beat()
        if self._error is not None:
            raise self._error
        started = self._pool.submit(action)
        started.add_done_callback(self._done)
        return started

    def wait(self, future: Future[T]) -> T:
        while True:
            with suppress(TimeoutError):
                return future.result(timeout=BEAT_SECONDS)
            if future.done():
                return future.result()
            self._beat()

    def _done(self, future: Future[Any]) -> None:
        if not future.cancelled():
            self._error = self._error or future.exception()
        self._free.release()
