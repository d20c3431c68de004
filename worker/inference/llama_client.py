"""Requests of a generate worker to its llama.cpp servers.

Plain sockets and no event loop: llama.cpp keeps every core busy, so whatever Python spends on a token is taken from its speed. Every
request has a connection of its own, because llama.cpp closes one after a streamed answer.
"""

from __future__ import annotations

import json
import select
import socket
import time
from collections.abc import Generator
from urllib.parse import urlsplit

import h11

from app.inference.external_server import away, refused, strange
from app.inference.llama_cpp import LlamaFold
from app.inference.protocol import Entry, GenerateRequest, RenderedPrompt
from app.kit.addresses import Address

CONNECT_SECONDS = 5.0
SILENT_SECONDS = 0.25
"""After this long without a token the caller is given an empty list, so that it can look whether anybody still reads."""
MAX_BYTES = 64 * 2**20


def answer(request: GenerateRequest, prompt: RenderedPrompt, address: Address) -> Generator[list[Entry], None, None]:
    """Entries of one request, in the order of our own engine. Closing it closes the connection, by which the server notices that nobody
    reads. Raises StudioError."""
    fold, parts = LlamaFold(request, prompt, address), urlsplit(address.url)
    until = time.monotonic() + request.seconds
    body = json.dumps(fold.body()).encode()
    headers = [("host", parts.netloc), ("authorization", f"Bearer {address.key}"), ("content-type", "application/json")]
    headers.append(("content-length", str(len(body))))
    status, held, total = 0, b"", 0
    try:
        with socket.create_connection((parts.hostname, parts.port), CONNECT_SECONDS) as connection:
            for event in _exchange(connection, h11.Request(method="POST", target=f"{parts.path}/{fold.path}", headers=headers), body):
                if time.monotonic() > until:
                    break  # the answer is cut, as by our own engine
                if event is None:
                    yield []
                elif isinstance(event, h11.Response):
                    status = event.status_code
                    yield [fold.started()] if status == 200 else []
                elif isinstance(event, h11.Data):
                    total += len(event.data)
                    if total > MAX_BYTES:
                        raise strange(address)
                    *lines, held = (held + event.data).split(b"\n") if status == 200 else (held + event.data,)
                    if entries := [entry for line in lines for entry in _entries(fold, line)]:
                        yield entries
    except (OSError, h11.ProtocolError) as error:
        raise away(address, error) from None
    if status not in (0, 200):
        raise refused(address, status, held, request)
    yield fold.end()


def _exchange(connection: socket.socket, request: h11.Request, body: bytes) -> Generator[h11.Event | None, None, None]:
    """The events of the response; None where nothing came for a while. Raises OSError and h11.ProtocolError."""
    wire, poll = h11.Connection(h11.CLIENT), select.poll()
    poll.register(connection, select.POLLIN)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.sendall(b"".join(wire.send(part) or b"" for part in (request, h11.Data(body), h11.EndOfMessage())))
    while True:
        event = wire.next_event()
        if event is h11.NEED_DATA:
            if poll.poll(SILENT_SECONDS * 1000):
                wire.receive_data(connection.recv(65536))
            else:
                yield None
            continue
        assert not isinstance(event, type), "the server cannot send before it is asked again"
        yield event
        if isinstance(event, h11.EndOfMessage):
            return


def _entries(fold: LlamaFold, line: bytes) -> list[Entry]:
    data = line[5:].strip() if line.startswith(b"data:") else b""
    return fold.take(data.decode("utf-8", "replace")) if data not in (b"", b"[DONE]") else []
