"""The client of a token stream: send a request, and receive its entries without a thread and without a database session.

Closing the iterator stops the generation. A reader that will get no more entries gets an error within seconds: the worker's key
has expired, an entry was lost, or nobody took the request.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextvars import ContextVar
from typing import Any, cast
from weakref import WeakKeyDictionary

import redis
import redis.asyncio
from starlette.concurrency import run_in_threadpool

from app import queue
from app.errors import StudioError, Unavailable
from app.inference import external_server
from app.inference.division import Division
from app.inference.protocol import (
    READER_SECONDS,
    Done,
    Entry,
    GenerateRequest,
    RenderedPrompt,
    StreamError,
    claim_key,
    reader_key,
    stream_key,
    unpack,
    worker_key,
)
from app.kit.humanize import human_number
from app.languages import gettext
from app.machines import heartbeats
from app.queue import GENERATE
from app.settings import get_settings

BLOCK_SECONDS = 1.0
SILENT_SECONDS = 10.0
RENEW_SECONDS = 2.0
AGAIN_SECONDS = 10.0
"""A request that nobody has taken is sent again; the claim makes a second message harmless."""
NO_WORKER_SECONDS = 20.0
WAIT_SECONDS = 90.0

BULK: ContextVar[bool] = ContextVar("bulk", default=False)
"""Whether what is asked in this context is one of very many requests, which leave room for people who chat."""

_clients: WeakKeyDictionary[asyncio.AbstractEventLoop, tuple[str, redis.asyncio.Redis]] = WeakKeyDictionary()
_farewells: set[asyncio.Task[object]] = set()


def _wire() -> redis.asyncio.Redis:
    """One client per event loop: its connections belong to the loop that opened them."""
    loop, url = asyncio.get_running_loop(), get_settings().redis_url
    if not url:
        raise Unavailable(gettext("No message broker is set."), hint=gettext("Start the studio with `luthier up`."))
    known = _clients.get(loop)
    if known is None or known[0] != url:
        # Longer than the timeout of a blocking read, which a silent server would otherwise extend forever.
        client = redis.asyncio.Redis.from_url(url, socket_timeout=SILENT_SECONDS, socket_connect_timeout=5, health_check_interval=15)
        known = _clients[loop] = (url, client)
    return known[1]


def raise_broke(entry: StreamError) -> None:
    """Raise a worker's error as it would have been raised here."""
    fault = StudioError(entry.message, hint=entry.hint, param=entry.param, code=entry.code)
    fault.status, fault.type = entry.status, entry.error_type
    raise fault


async def stream(request: GenerateRequest) -> AsyncIterator[list[Entry]]:
    """Entries of one request, in order and complete, ending with Done. Raises StudioError when it fails.

    A request with an external engine is rendered by a worker and answered by that server. With `split` reasoning and tool calls are
    entries of their own.
    """
    request = request.model_copy(update={"bulk": True}) if BULK.get() else request
    outside, division = request.engine is not None and not request.engine.local, Division(request.tools or ())
    async with contextlib.aclosing(_outside(request) if outside else _own(request)) as answer:
        async for entries in answer:
            yield division.take(entries) if request.split else entries


async def _outside(request: GenerateRequest) -> AsyncGenerator[list[Entry]]:
    rendered = None
    if request.messages is None or request.engine is None or request.engine.via == "tokens":
        async for entries in _own(request.model_copy(update={"id": uuid.uuid4(), "engine": None, "render": True})):
            rendered = next((e for e in entries if isinstance(e, RenderedPrompt)), rendered)
    async with contextlib.aclosing(external_server.answer(request, rendered)) as answer:
        async for entries in answer:
            yield entries


async def _own(request: GenerateRequest) -> AsyncGenerator[list[Entry]]:
    """Through the queue, from a generate worker of this studio."""
    wire = _wire()
    try:
        await wire.set(reader_key(request.id), 1, ex=READER_SECONDS)
        await _send(request)
        async for entries in _read(wire, request):
            for entry in entries:
                if isinstance(entry, StreamError):
                    raise_broke(entry)
            yield entries
            if entries and isinstance(entries[-1], Done):
                return
    except redis.RedisError as error:
        if queue.cannot_write(error):
            raise  # it is not unreachable; `app.web.error_responses` says what is wrong
        raise Unavailable(gettext("The message broker went away in the middle of the answer."), hint=gettext("Ask again.")) from error
    finally:
        # Not awaited here: a reader that is being cancelled must not wait for anything.
        task = asyncio.ensure_future(_leave(wire, request))
        _farewells.add(task)
        task.add_done_callback(_farewells.discard)


async def _leave(wire: redis.asyncio.Redis, request: GenerateRequest) -> None:
    with contextlib.suppress(redis.RedisError, RuntimeError):
        await wire.set(reader_key(request.id), "left", ex=60)
        await wire.delete(stream_key(request.id))


async def _send(request: GenerateRequest) -> None:
    payload = request.model_dump(mode="json")
    await run_in_threadpool(queue.celery.send_task, GENERATE, args=[payload], expires=WAIT_SECONDS)


async def _read(wire: redis.asyncio.Redis, request: GenerateRequest) -> AsyncIterator[list[Entry]]:
    key, last, seq = stream_key(request.id), b"0-0", 0
    watch = _Watch(wire, request)
    while True:
        await watch.renew()
        found = await wire.xread({key: last}, count=64, block=int(BLOCK_SECONDS * 1000))
        if not found:
            await watch.check()
            continue
        watch.heard()
        streams = cast("list[list[Any]] | dict[bytes, list[Any]]", found)  # by RESP 2 or RESP 3
        entries = streams[0][1] if isinstance(streams, list) else next(iter(streams.values()))[0]
        for entry_id, fields in entries:
            last = entry_id
            if int(fields[b"seq"]) != seq:
                raise Unavailable(gettext("A part of the answer was lost on the way."), hint=gettext("Ask again."), code="answer_lost")
            seq += 1
            yield unpack(fields[b"entries"])


class _Watch:
    """Renews the reader's own key and checks the worker's while nothing arrives."""

    def __init__(self, wire: redis.asyncio.Redis, request: GenerateRequest) -> None:
        self.wire, self.request = wire, request
        self.began = self.sent = time.monotonic()
        self.renewed = 0.0
        self.worker: str | None = None
        self.absent = 0

    async def renew(self) -> None:
        now = time.monotonic()
        if now - self.renewed > RENEW_SECONDS:
            await self.wire.set(reader_key(self.request.id), 1, ex=READER_SECONDS)
            self.renewed = now

    def heard(self) -> None:
        self.absent = 0

    async def check(self) -> None:
        """Raises Unavailable once it is certain that nothing will come."""
        if self.worker is None:
            claimed = await self.wire.get(claim_key(self.request.id))
            if claimed is None:
                await self._unclaimed()
                return
            assert isinstance(claimed, bytes)  # the connection decodes nothing
            self.worker = claimed.decode()
        self.absent = 0 if await self.wire.exists(worker_key(self.worker)) else self.absent + 1
        if self.absent >= 2:
            raise Unavailable(
                gettext("The worker that was answering has stopped."),
                hint=gettext("Ask again: it starts anew by itself."),
                code="worker_lost",
            )

    async def _unclaimed(self) -> None:
        now = time.monotonic()
        if now - self.began > WAIT_SECONDS:
            raise Unavailable(
                gettext("Every worker has had its hands full for %(seconds)s seconds.", seconds=human_number(WAIT_SECONDS, 0)),
                hint=gettext("Try again in a moment, or start another generate worker."),
                code="busy",
            )
        if now - self.began > NO_WORKER_SECONDS and not [w for w in await run_in_threadpool(heartbeats.alive) if w.queue == "generate"]:
            raise Unavailable(
                gettext("No generate worker is running."), hint=gettext("Start the studio with `luthier up`."), code="no_worker"
            )
        if now - self.sent > AGAIN_SECONDS:
            self.sent = now
            await _send(self.request)
