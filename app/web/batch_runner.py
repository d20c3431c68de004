"""Runs batches in the web process: each request of a batch passes through the application itself, as if its person had sent it.

So an answer in a batch is what the endpoint answers, and whatever the endpoint refuses is refused here. All batches of a process
have `AT_ONCE` requests under way, marked as bulk, so that the engine puts people who chat first. With several web processes each
open batch is held by one of them, by the lease protocol.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from fastapi import FastAPI
from sqlalchemy.exc import DBAPIError
from starlette.concurrency import run_in_threadpool
from starlette.types import Message

from app.batches import requests
from app.batches import service as batches
from app.batches.requests import RequestPlace
from app.db import transaction
from app.errors import NotFound, StudioError
from app.inference.client import BULK
from app.settings import get_settings
from app.storage import files
from app.tables import File, RequestBatch
from app.web.auth import ON_BEHALF, OnBehalf

log = logging.getLogger("luthier.batches")

AT_ONCE = 8
BATCHES_AT_ONCE = 4
LOOK_SECONDS = 5.0
"""Polling interval, for batches that another process created or left."""
BEAT_SECONDS = 2.0
WAITS_SECONDS = (2.0, 5.0, 15.0, 60.0)
"""Pauses before a request is sent again that was refused for now (429, 503); the last one repeats until the batch expires."""
FAULTS = 3
"""A request that fails with another error of the server is sent this often."""

T = TypeVar("T")


class _LeaseLost(Exception):
    """Another process holds the batch, or its project was deleted."""


class Sent(NamedTuple):
    """The answer to a request."""

    status_code: int
    request_id: str
    body: dict[str, Any]


async def send(app: FastAPI, path: str, body: dict[str, Any], who: OnBehalf) -> Sent:
    """POST a JSON body to the application, without a network."""
    data = json.dumps(body).encode()
    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    scope: dict[str, Any] = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": path, "raw_path": path.encode(), "root_path": "", "query_string": b"", "headers": headers, "client": ("127.0.0.1", 0),
        "server": ("127.0.0.1", 80), ON_BEHALF: who,
    }  # fmt: skip
    waiting: list[Message] = [{"type": "http.request", "body": data, "more_body": False}]
    status, request_id, parts = 500, "", list[bytes]()

    async def receive() -> Message:
        if waiting:
            return waiting.pop()
        await asyncio.Event().wait()  # the client never leaves
        raise AssertionError

    async def hear(message: Message) -> None:
        nonlocal status, request_id
        if message["type"] == "http.response.start":
            status = message["status"]
            request_id = dict(message["headers"]).get(b"x-request-id", b"").decode()
        elif message["type"] == "http.response.body":
            parts.append(message.get("body", b""))

    BULK.set(True)
    await app(scope, receive, hear)
    return Sent(status, request_id, json.loads(b"".join(parts)))


def wake(app: FastAPI) -> None:
    """Have the runner of a started application look for a batch now. From any thread."""
    if (runner := getattr(app.state, "batches", None)) is not None:
        runner.loop.call_soon_threadsafe(runner.told.set)


class BatchRunner:
    """Takes open batches and runs them, until it is cancelled."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app
        self.running: set[asyncio.Task[None]] = set()
        self.slots = asyncio.Semaphore(AT_ONCE)
        self.loop = asyncio.get_running_loop()
        self.told = asyncio.Event()

    async def run(self) -> None:
        try:
            while True:
                self.told.clear()
                if len(self.running) < BATCHES_AT_ONCE and (batch := await self._next()) is not None:
                    task = asyncio.create_task(self._one(batch))
                    self.running.add(task)
                    task.add_done_callback(self._ended)
                else:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self.told.wait(), LOOK_SECONDS)
        finally:
            for task in self.running:
                task.cancel()
            await asyncio.gather(*self.running, return_exceptions=True)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.running.discard(task)
        self.told.set()

    async def _next(self) -> RequestBatch | None:
        with contextlib.suppress(DBAPIError, StudioError, OSError):  # the database is away: ask again
            return await run_in_threadpool(_in_transaction, batches.claim_next)
        return None

    async def _one(self, batch: RequestBatch) -> None:
        attempt = BatchAttempt(self.app, batch, self.slots)
        try:
            await attempt.through()
        except _LeaseLost:
            log.info("batch %s is held by another process", batch.id)
        except StudioError as fault:
            await attempt.fail(fault.code or "failed", f"{fault.message} {fault.hint}".strip())
        except (DBAPIError, OSError):
            log.warning("batch %s waits for its lease to end: the database or the disk failed", batch.id, exc_info=True)
        except asyncio.CancelledError:
            with contextlib.suppress(Exception):  # what is not released waits for the end of its lease
                await asyncio.shield(attempt.leave())
            raise
        except Exception:
            log.exception("batch %s failed", batch.id)
            await attempt.fail("internal_error", "The studio could not run it; its log says why.")


def _in_transaction(work: Callable[[Any], T]) -> T:
    with transaction() as session:
        return work(session)


class BatchAttempt:
    """One process's part of a batch: the requests without an answer, several at a time, stored every few seconds."""

    def __init__(self, app: FastAPI, batch: RequestBatch, slots: asyncio.Semaphore) -> None:
        self.app, self.batch, self.slots = app, batch, slots
        self.who = OnBehalf(batch.owner_id, batch.project_id)
        self.unstored: list[dict[str, Any]] = []
        self.ended = asyncio.Event()
        """Set once nothing more is sent: the batch was cancelled or its time is over."""

    async def write(self, work: Callable[[Any], T]) -> T:
        return await run_in_threadpool(_in_transaction, work)

    async def through(self) -> None:
        path = await self.write(self._input)
        reading = asyncio.ensure_future(run_in_threadpool(requests.find, path, self.batch.endpoint))
        while not (await asyncio.wait({reading}, timeout=BEAT_SECONDS))[0]:
            await self.store()
        found = reading.result()
        if not await self.write(lambda session: batches.begin(session, self.batch.id, self.batch.fence, found)):
            raise _LeaseLost
        if found.errors:
            return
        done = await self.write(lambda session: batches.answered(session, self.batch.id))
        await self.store()
        await self._send_all(path, [place for place in found.places if place.line not in done])
        await self._finish(found.places)

    def _input(self, session: Any) -> Path:
        path = files.blob_path(session.get_one(File, self.batch.input_file_id).sha256)
        if not path.is_file():
            raise NotFound("The input file was deleted.", hint="Upload it again.", code="input_file_missing")
        return path

    async def _send_all(self, path: Path, places: list[RequestPlace]) -> None:
        rest: Iterator[RequestPlace] = iter(places)
        pending: set[asyncio.Task[None]] = set()
        beaten = time.monotonic()
        try:
            while not self.ended.is_set():
                for place in islice(rest, AT_ONCE - len(pending)):
                    pending.add(asyncio.create_task(self._answer(path, place)))
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

    async def _answer(self, path: Path, place: RequestPlace) -> None:
        body, faults, waits = await run_in_threadpool(requests.body_of, path, place), 0, 0
        while True:
            async with self.slots:
                sent = await send(self.app, self.batch.endpoint, body, self.who)
            if sent.status_code in (429, 503):
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.ended.wait(), WAITS_SECONDS[min(waits, len(WAITS_SECONDS) - 1)])
                waits += 1
                if not self.ended.is_set():
                    continue
                return
            faults += sent.status_code >= 500
            if sent.status_code < 500 or faults >= FAULTS:
                self.unstored.append({"line": place.line, "custom_id": place.custom_id, **sent._asdict()})
                return

    async def store(self) -> None:
        """Renew the lease and store the answers since the last time. Raises _LeaseLost."""
        rows, self.unstored = self.unstored, []
        batch = await self.write(lambda session: batches.store(session, self.batch.id, self.batch.fence, rows))
        if batch is None:
            raise _LeaseLost
        if batch.finalizing_at:
            self.ended.set()

    async def fail(self, code: str, message: str) -> None:
        """End the batch, which cannot be run."""
        await self.write(lambda session: batches.fail(session, self.batch.id, self.batch.fence, code, message))

    async def leave(self) -> None:
        """Store what there is, and let another process go on."""
        await self.store()
        await self.write(lambda session: batches.release(session, self.batch.id, self.batch.fence))

    async def _finish(self, places: list[RequestPlace]) -> None:
        await self.store()
        if not await self.write(lambda session: batches.finalize(session, self.batch.id, self.batch.fence, places)):
            raise _LeaseLost
        writing = asyncio.ensure_future(run_in_threadpool(_write_files, self.batch.id))
        while not (await asyncio.wait({writing}, timeout=BEAT_SECONDS))[0]:
            await self.store()
        output, errors = writing.result()
        if not await self.write(lambda session: batches.end(session, self.batch.id, self.batch.fence, output, errors)):
            raise _LeaseLost


def _write_files(batch_id: uuid.UUID) -> tuple[files.Blob | None, files.Blob | None]:
    """The output file and the file of errors, as stored bytes; None for one without a line."""
    return _file_of(batch_id, good=True), _file_of(batch_id, good=False)


def _file_of(batch_id: uuid.UUID, *, good: bool) -> files.Blob | None:
    writer = files.BlobWriter(get_settings().upload_limit_bytes)
    try:
        with transaction() as session:
            for line in batches.output_lines(session, batch_id, good=good):
                writer.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        return writer.finish() if writer.bytes else None
    finally:
        writer.discard()
