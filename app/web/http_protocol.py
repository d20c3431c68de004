"""uvicorn's HTTP protocol with limits on bytes, time and connections, before authentication.

`uvicorn --http app.web.http_protocol:Guarded` loads it. uvicorn has no such limits with httptools, so without these a stranger
could fill the memory with one endless header, or use up all descriptors with idle connections.

A request has `REQUEST_SECONDS` until its headers are complete and `MAX_HEADER_BYTES` for them; while its body arrives, at least
`MIN_BODY_BYTES` must arrive in each `BODY_SECONDS`, which the slowest line does, so an upload of any size may take as long as it
needs. A response may last forever: requests that have arrived completely are not limited. A client that does not read its
response is dropped by the kernel after `UNREAD_SECONDS`.
"""

from __future__ import annotations

import asyncio
import functools
import resource
import socket
from collections import Counter
from http import HTTPStatus
from typing import Any

from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.kit.addresses import is_loopback, network_of
from app.settings import get_settings

MAX_HEADER_BYTES = 64 * 2**10
MAX_HEADERS = 128
MAX_PIPELINED = 16
"""Requests that may wait behind the current one on the same connection."""

REQUEST_SECONDS = 20.0
BODY_SECONDS = 60.0
MIN_BODY_BYTES = 1024
UNREAD_SECONDS = 120

MAX_DESCRIPTORS = 65_536
"""No more are requested where a container allows a billion: some programs iterate over all possible descriptors."""

_held: Counter[str] = Counter()
"""Open connections of this process by client network."""


@functools.cache
def max_connections() -> int:
    """Maximum connections of this process: the setting, or what its descriptors allow besides files and databases.

    The soft limit on descriptors is raised to the hard one first: a shell's 1,024 would limit the watchers of a job.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    allowed = MAX_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft
    return min(get_settings().max_connections, allowed - max(allowed // 8, 192))


@functools.lru_cache(maxsize=1024)
def max_connections_from(address: str) -> int:
    """Maximum connections from the network of one address. Loopback, where tunnels and proxies of this machine end, and the
    proxies in the settings speak for many clients: they may use all but what is reserved for one other network."""
    settings, total = get_settings(), max_connections()
    each = min(settings.max_connections_per_address, total // 2)
    proxies = ProxyHeadersMiddleware(nothing, settings.forwarded_allow_ips).trusted_hosts
    return total - each if not address or is_loopback(address) or address in proxies else each


async def nothing(*_: Any) -> None:
    """A no-op application behind a middleware that is only used to find out whom it trusts."""


class Guarded(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.network = ""
        self.refusal: HTTPStatus | None = None
        self.header_bytes = self.body_bytes = self.idle_bytes = 0
        self.in_body = self.moved = False  # `moved`: whether the parser made progress with the last bytes
        self.due: float | None = None  # loop time by which the awaited bytes must arrive; None while nothing is awaited
        self.timer: asyncio.TimerHandle | None = None

    # The connection ----------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        address = self.client[0] if self.client else ""
        self.network = network_of(address)
        _held[self.network] += 1
        if len(self.connections) > max_connections() or _held[self.network] > max_connections_from(address):
            self.refuse(HTTPStatus.SERVICE_UNAVAILABLE)
            return
        connection = transport.get_extra_info("socket")
        if connection is not None and connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_SECONDS * 1000)
        self.expect(REQUEST_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        _held[self.network] -= 1
        if not _held[self.network]:
            del _held[self.network]
        self.due = None
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """`idle_bytes` counts bytes without progress: an endless header, trailer or chunk extension, which the parser buffers
        until it is complete, or empty lines between two requests."""
        self.moved = False
        super().data_received(data)
        self.idle_bytes = 0 if self.moved else self.idle_bytes + len(data)
        if self.idle_bytes > MAX_HEADER_BYTES:
            self.refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)

    def send_400_response(self, msg: str) -> None:
        """Everything that the parser or one of the callbacks below refuses ends up here."""
        self.refuse(self.refusal or HTTPStatus.BAD_REQUEST)

    def refuse(self, status: HTTPStatus) -> None:
        """Respond with an error and close; only close where a response has started already."""
        if self.transport.is_closing():
            return
        if not self.pipeline and (self.cycle is None or self.cycle.response_complete or not self.cycle.response_started):
            said = f"{status.value} {status.phrase}\n".encode()
            head = f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: text/plain\r\ncontent-length: {len(said)}\r\n"
            self.transport.write(head.encode() + b"connection: close\r\n\r\n" + said)
        self.transport.close()

    def _should_upgrade_to_ws(self) -> bool:
        return False  # no WebSocket here

    # The request -------------------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.header_bytes = 0
        self.expect(REQUEST_SECONDS)

    def on_url(self, url: bytes) -> None:
        self.count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.count(len(name) + len(value) + 4)
        super().on_header(name, value)
        if len(self.headers) > MAX_HEADERS:
            self.stop_parsing(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)

    def count(self, size: int) -> None:
        self.header_bytes += size
        if self.header_bytes > MAX_HEADER_BYTES:
            self.stop_parsing(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)

    def stop_parsing(self, status: HTTPStatus) -> None:
        """An exception in a callback ends the parser; uvicorn then answers with `send_400_response`."""
        self.refusal = status
        raise ValueError(status.phrase)

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= MAX_PIPELINED:
            self.stop_parsing(HTTPStatus.TOO_MANY_REQUESTS)
        self.moved = True
        super().on_headers_complete()
        self.in_body, self.body_bytes = True, 0
        self.expect(BODY_SECONDS)

    def on_body(self, body: bytes) -> None:
        self.moved = True
        self.body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self.moved = True
        super().on_message_complete()
        self.in_body, self.due = False, None
        if self.cycle.response_complete:  # it was answered before its body arrived
            self.expect(REQUEST_SECONDS)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.due is None and self.cycle.response_complete and not self.transport.is_closing():
            self.expect(REQUEST_SECONDS)

    # Time --------------------------------------------------------------------------------------------------------------

    def expect(self, seconds: float) -> None:
        """The awaited bytes must arrive within `seconds`. One timer per connection serves all its requests: it is only
        rescheduled when it fires, because creating and cancelling one per request costs more than everything else here."""
        self.due = self.loop.time() + seconds
        if self.timer is None:
            self.timer = self.loop.call_at(self.due, self.look)
        elif self.timer.when() > self.due:
            self.timer.cancel()
            self.timer = self.loop.call_at(self.due, self.look)

    def look(self) -> None:
        self.timer = None
        if self.due is None or self.transport.is_closing():
            return
        if self.due > self.loop.time():
            self.timer = self.loop.call_at(self.due, self.look)
        elif self.in_body and (self.is_held_up() or self.body_bytes >= MIN_BODY_BYTES):
            self.body_bytes = 0
            self.expect(BODY_SECONDS)
        else:
            self.refuse(HTTPStatus.REQUEST_TIMEOUT)

    def is_held_up(self) -> bool:
        """Whether the body waits for us: reading is paused, or the body was not requested yet."""
        return self.flow.read_paused or self.cycle.waiting_for_100_continue
