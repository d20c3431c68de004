"""The body of the Celery task GENERATE: claim one request, run it in this process's engine, publish its entries.

The worker keeps no state that matters: killed at any moment, it leaves streams that expire, and readers notice within seconds
that its key is gone. A reader that leaves says so in its key; the key of one that died expires.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Generator
from typing import Any

import redis

from app.inference.protocol import (
    STREAM_SECONDS,
    WORKER_SECONDS,
    Done,
    Entry,
    GenerateRequest,
    claim_key,
    pack,
    reader_key,
    stream_key,
    worker_key,
)
from app.models.integrity import BadModel, tell
from app.queue import get_redis
from worker.runtime.fast_import import importing

log = logging.getLogger(__name__)

# Waiting threads must sleep, not spin: next to a training job on two cores a step took 100 to 250 ms instead of 500 to 600. The
# variable is read when torch is first imported, which happens with the first request.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

NAME = uuid.uuid4().hex
"""This process, as readers know it."""
LEFT = b"left"
"""Value of a reader's key once the reader has left."""
DEAD_ENGINE = 70
"""Exit code of a worker whose engine thread died."""
MISSING_SECONDS = 5.0
"""A reader's key may be missing this long before the reader is taken for dead, because Redis may have been flushed."""


def generate(payload: dict[str, Any]) -> None:
    """Run one request, unless another delivery of its message came first or its reader has left."""
    request = GenerateRequest.model_validate(payload)
    wire = get_redis()
    _keep_pulse()
    if not wire.set(claim_key(request.id), NAME, nx=True, ex=int(request.seconds) + 60):
        return
    if wire.get(reader_key(request.id)) in (None, LEFT):
        wire.delete(claim_key(request.id))
        return
    _answer(Publisher(wire, request.id), request)


def _answer(publisher: Publisher, request: GenerateRequest) -> None:
    from worker.inference.errors import broke

    try:
        if request.embed is not None:
            from worker.inference.embeddings import embed

            found = embed(request.model, request.embed)
            done = Done(prompt_tokens=found.tokens, completion_tokens=0, first_token_seconds=None, tokens_per_second=None)
            return publisher.say([found, done])
        if request.classify is not None:
            from worker.inference.classify import classify

            sorted_, tokens = classify(request.model, request.classify)
            done = Done(prompt_tokens=tokens, completion_tokens=0, first_token_seconds=None, tokens_per_second=None)
            return publisher.say([sorted_, done])
        if request.reward is not None:
            from worker.inference.reward import reward

            rewarded = reward(request.model, request.reward)
            done = Done(prompt_tokens=rewarded.tokens, completion_tokens=0, first_token_seconds=None, tokens_per_second=None)
            return publisher.say([rewarded, done])
        if request.render:
            from worker.inference.request import rendered

            written = rendered(request, engine().shelf)
            done = Done(prompt_tokens=len(written.tokens), completion_tokens=0, first_token_seconds=None, tokens_per_second=None)
            return publisher.say([written, done])
        with contextlib.closing(answer(request)) as entries_of_it:
            for entries in entries_of_it:
                publisher.say(entries)
                if not publisher.is_read():
                    return
    except redis.RedisError as error:
        log.warning("Answer %s was dropped: Redis is unreachable (%s).", request.id, error)
    except Exception as error:
        log.info("Answer %s ended: %s", request.id, error, exc_info=not hasattr(error, "hint"))
        if isinstance(error, BadModel):
            tell(error)
        publisher.say([broke(error)])


class Publisher:
    """Writes one stream. `is_read` is false once the reader has left or has been silent for too long."""

    def __init__(self, wire: redis.Redis, request_id: uuid.UUID) -> None:
        self.wire, self.id, self.seq = wire, request_id, 0
        self.reader: bytes | None = b"1"
        self.missing_since: float | None = None

    def say(self, entries: list[Entry]) -> None:
        with self.wire.pipeline(transaction=False) as pipe:
            if entries:
                pipe.xadd(stream_key(self.id), {b"seq": self.seq, b"entries": pack(entries)})
                pipe.expire(stream_key(self.id), STREAM_SECONDS)
                self.seq += 1
            pipe.get(reader_key(self.id))
            self.reader = pipe.execute()[-1]
        if self.reader == LEFT:
            self.wire.delete(stream_key(self.id))  # its reader did so when it left, and what was written since would stay until it expires

    def is_read(self) -> bool:
        if self.reader is not None:
            self.missing_since = None
            return self.reader != LEFT
        self.missing_since = self.missing_since or time.monotonic()
        return time.monotonic() - self.missing_since < MISSING_SECONDS


def answer(request: GenerateRequest) -> Generator[list[Entry], None, None]:
    """Entries of a request, from this process's engine, from its llama.cpp, or from the external server the request names."""
    if request.engine is None:
        yield from engine().answer(request)
        return
    from app.inference import external_server
    from worker.inference.request import rendered

    prompt = rendered(request, engine().shelf) if request.messages is None or request.engine.via == "tokens" else None
    if not request.engine.local:
        yield from entries_of(external_server.answer(request, prompt))
        return
    assert prompt is not None, "its prompts are rendered here"
    yield from llama_cpp().answer(request, prompt)


def entries_of(stream: AsyncGenerator[list[Entry]]) -> Generator[list[Entry], None, None]:
    """The same entries for a caller without an event loop. An empty list comes where there was none for a quarter of a second, so that
    the caller can look whether anybody still reads."""
    loop = asyncio.new_event_loop()
    try:
        while True:
            following = loop.create_task(anext(stream, None))
            while not loop.run_until_complete(asyncio.wait({following}, timeout=0.25))[0]:
                yield []
            if (entries := following.result()) is None:
                return
            yield entries
    finally:
        if not following.done():
            following.cancel()
            loop.run_until_complete(asyncio.wait({following}))
        loop.run_until_complete(stream.aclose())
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def _leave() -> None:
    """Leave after the engine has died: tell the readers, then exit, so that the worker's parent starts a new process."""
    log.critical("The engine's thread has died; the worker exits, to be restarted.")
    time.sleep(1)
    os._exit(DEAD_ENGINE)


_starting = threading.Lock()


@functools.cache
def _started_engine() -> Any:
    with importing():
        from worker.inference.engine import Engine
        from worker.inference.eviction import keep_tidy

    started = Engine(on_death=_leave)
    keep_tidy(started.shelf, NAME)
    return started


@functools.cache
def llama_cpp() -> Any:
    """The llama.cpp servers of this process."""
    from worker.inference.llama_cpp import LlamaServers

    return LlamaServers(engine().shelf)


def engine() -> Any:
    """The engine of this process, started with the first request. The lock keeps two first requests from starting two."""
    with _starting:
        return _started_engine()


@functools.cache
def _pulse() -> threading.Thread:
    def beat() -> None:
        while True:
            with contextlib.suppress(redis.RedisError):
                get_redis().set(worker_key(NAME), 1, ex=WORKER_SECONDS)
            time.sleep(1)

    with contextlib.suppress(redis.RedisError):
        get_redis().set(worker_key(NAME), 1, ex=WORKER_SECONDS)
    thread = threading.Thread(target=beat, name="pulse", daemon=True)
    thread.start()
    return thread


def _keep_pulse() -> None:
    with _starting:
        _pulse()
