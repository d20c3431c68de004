"""A client that puts raw bytes to an ASGI application, as an HTTP server would. httpx would refuse or mend half of them."""

from __future__ import annotations

import asyncio
import time
import zlib
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

Headers = list[tuple[bytes, bytes]]


@dataclass
class Raw:
    """One request: method, percent-encoded path, query, headers and body, each as bytes."""

    method: str
    path: bytes
    query: bytes = b""
    headers: Headers = field(default_factory=list)
    body: bytes = b""

    def __str__(self) -> str:
        shown = self.body if len(self.body) <= 600 else self.body[:400] + b"... %d bytes" % len(self.body)
        more = b", ".join(name + b": " + value[:80] for name, value in self.headers if name not in (b"authorization", b"cookie", b"host"))
        address = self.path[:300] + (b"?" + self.query[:600] if self.query else b"")
        return f"{self.method} {address.decode('latin-1')}  [{more.decode('latin-1')}]  {shown!r}"


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float
    error: BaseException | None = None
    """What came out of the application in place of an answer."""

    @property
    def text(self) -> str:
        return self.body.decode("utf-8", "replace")


async def ask(app: Any, raw: Raw, *, seconds: float = 60.0) -> Answer:
    """The application's answer. A stream of events that never ends is left after its first part."""
    said = Answer(0, {}, b"", 0.0)
    gone, sent = asyncio.Event(), False

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": raw.body, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            said.status = message["status"]
            said.headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in message["headers"]}
            if raw.method == "GET" and said.headers.get("content-type", "").startswith("text/event-stream"):
                gone.set()
        elif len(said.body) < 1 << 20:
            said.body += message.get("body", b"")

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": raw.method,
        "scheme": "http",
        "path": unquote(raw.path.decode("latin-1")),
        "raw_path": raw.path,
        "query_string": raw.query,
        "root_path": "",
        "headers": raw.headers,
        "client": ("127.0.0.1", 50000),
        "server": ("127.0.0.1", 8000),
        "state": {},
    }
    began = time.monotonic()
    try:
        await asyncio.wait_for(app(scope, receive, send), seconds)
    except Exception as error:
        said.error = error
    if said.headers.get("content-encoding") == "gzip":
        said.body = zlib.decompressobj(31).decompress(said.body)
    said.seconds = time.monotonic() - began
    return said
