"""Requests that the studio sends to its own application, for a person and without a network.

They pass every layer that a request from outside passes, so what they are answered is what the endpoint answers. They are marked as
bulk: the engine puts people who chat first.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any, NamedTuple

from fastapi import FastAPI
from starlette.types import Message

from app.inference.client import BULK
from app.web.auth import ON_BEHALF, OnBehalf

WAITS_SECONDS = (2.0, 5.0, 15.0, 60.0)
"""Pauses before a request is sent again that was refused for now (429, 503); the last one repeats."""
FAULTS = 3
"""A request that fails with another error of the server is sent this often."""


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


async def send_until_answered(
    app: FastAPI, path: str, body: dict[str, Any], who: OnBehalf, slots: asyncio.Semaphore, ended: asyncio.Event
) -> Sent | None:
    """The same, sent again while it is refused for now. None: that was so until `ended`."""
    faults = waits = 0
    while True:
        async with slots:
            sent = await send(app, path, body, who)
        if sent.status_code in (429, 503):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), WAITS_SECONDS[min(waits, len(WAITS_SECONDS) - 1)])
            waits += 1
            if ended.is_set():
                return None
            continue
        faults += sent.status_code >= 500
        if sent.status_code < 500 or faults >= FAULTS:
            return sent
