"""Streams of answers to clients: several merged into one, stopped when the client disconnects.

A client that leaves stops the work for it: a stream is closed by the server, and a call that waits for a whole answer watches its
connection with `while_connected`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from typing import Any

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from app.errors import NotSignedIn
from app.inference import client
from app.inference.protocol import Entry, GenerateRequest, StreamError
from app.languages import gettext
from app.web import error_responses
from app.web.revocation import doorkeeper

STUCK_SECONDS = 30.0
"""A client that reads nothing for this long is dropped."""
AGAIN_SECONDS = 0.1
"""A task that still runs this long after it was cancelled is cancelled again."""
CLIENT_LEFT = 499
"""Status in the log of a response that nobody was there to read. No client ever sees it."""


async def merge(streams: list[AsyncIterator[list[Entry]]]) -> AsyncIterator[tuple[int, list[Entry]]]:
    """Entries of several streams as they come, each with its stream's index. The first error ends all of them."""
    box: asyncio.Queue[tuple[int, list[Entry] | Exception | None]] = asyncio.Queue(maxsize=8)

    async def pump(place: int, stream: AsyncIterator[list[Entry]]) -> None:
        try:
            async for entries in stream:
                await box.put((place, entries))
            await box.put((place, None))
        except Exception as error:
            await box.put((place, error))
        finally:
            await stream.aclose()  # type: ignore[attr-defined]

    pumps = [asyncio.ensure_future(pump(i, s)) for i, s in enumerate(streams)]
    left = len(pumps)
    try:
        while left:
            place, found = await box.get()
            if found is None:
                left -= 1
            elif isinstance(found, Exception):
                raise found
            else:
                yield place, found
    finally:
        # Not awaited here: a reader that is being cancelled must not wait for anything.
        _keep(asyncio.ensure_future(_end(pumps)))


async def _end(tasks: Iterable[asyncio.Future[None]]) -> None:
    """Cancel tasks until they have ended. Once is not enough before Python 3.12, whose `asyncio.wait_for` may lose a cancellation
    that arrives when its awaitable completes: redis-py sends each command through it."""
    going = set(tasks)
    while going:
        for task in going:
            task.cancel()
        _, going = await asyncio.wait(going, timeout=AGAIN_SECONDS)


async def while_connected(request: Request, work: Coroutine[Any, Any, None]) -> bool:
    """Run `work` for as long as the client is connected. False: the client left first, and `work` was cancelled.

    The body of the request must have been read; exceptions of `work` are raised here.
    """
    gone, working = asyncio.ensure_future(_gone(request)), asyncio.ensure_future(work)
    try:
        await asyncio.wait({gone, working}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
            return True
        working.cancel()
        await asyncio.wait({working})  # so that no entries arrive any more when the caller stores them
        return False
    finally:
        gone.cancel()
        working.cancel()


async def collect(request: Request, streams: list[AsyncIterator[list[Entry]]]) -> list[list[Entry]] | None:
    """All entries of each stream, once all have ended. None: the client has left."""
    heard: list[list[Entry]] = [[] for _ in streams]

    async def listen_to_all() -> None:
        async for place, entries in merge(streams):
            heard[place] += entries

    return heard if await while_connected(request, listen_to_all()) else None


async def _gone(request: Request) -> None:
    """Returns when the client has closed its connection. The body has been read, so no other message can come."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def left() -> Response:
    """The response to a client that has disconnected."""
    return Response(status_code=CLIENT_LEFT)


_tasks: set[asyncio.Future[Any]] = set()


def _keep(task: asyncio.Future[Any]) -> None:
    """Keep a reference to a task that nobody awaits: the event loop has only a weak one."""
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)


def later(work: Callable[[], None]) -> None:
    """Run `work` in a thread, even when the request that started it is being cancelled."""
    _keep(asyncio.ensure_future(asyncio.to_thread(work)))


def _revoked() -> NotSignedIn:
    return NotSignedIn(
        gettext("What this stream was opened with is not valid any more."), hint=gettext("Sign in again, or use another API key.")
    )


class Stream(StreamingResponse):
    """Server-sent events: a client that reads nothing for half a minute is dropped, and so is one whose key or session is
    revoked, with an error event."""

    complete = False

    def __init__(self, content: AsyncIterator[bytes], media_type: str = "text/event-stream") -> None:
        super().__init__(content, media_type=media_type, headers={"cache-control": "no-store", "x-accel-buffering": "no"})

    async def stream_response(self, send: Send) -> None:
        async def impatient(message: Any) -> None:
            async with asyncio.timeout(STUCK_SECONDS):
                await send(message)

        try:
            await super().stream_response(impatient)
            self.complete = True
        finally:
            await self.body_iterator.aclose()  # type: ignore[attr-defined]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        revoked = asyncio.Event()

        async def receive_or_end() -> Message:
            heard, ended = asyncio.ensure_future(receive()), asyncio.ensure_future(revoked.wait())
            try:
                await asyncio.wait({heard, ended}, return_when=asyncio.FIRST_COMPLETED)
                return heard.result() if heard.done() else {"type": "http.disconnect"}
            finally:
                heard.cancel()
                ended.cancel()

        with doorkeeper().watching(scope, revoked.set):
            await super().__call__(scope, receive_or_end, send)
        if revoked.is_set() and not self.complete:
            events = self.media_type == "text/event-stream"
            last = b"data: " + json.dumps({"error": _revoked().as_json()}).encode() + b"\n\n" if events else b""
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STUCK_SECONDS):
                    await send({"type": "http.response.body", "body": last, "more_body": False})


async def stream_or_error(request: GenerateRequest) -> AsyncIterator[list[Entry]]:
    """As `client.stream`, but an error is the last entry: one pane's error must not end the others."""
    try:
        async for entries in client.stream(request):
            yield entries
    except Exception as error:
        fault = error_responses.fault_of(error)
        yield [
            StreamError(
                status=fault.status, code=fault.code, error_type=fault.type, message=fault.message, hint=fault.hint, param=fault.param
            )
        ]
