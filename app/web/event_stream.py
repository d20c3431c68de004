"""Live job events: server-sent events for any number of watchers in one web process.

    Postgres ◀── one query per job and wake-up ── Feed ──▶ its ring of encoded events ──▶ every watcher of the job
    Redis ──── one subscription per process ──▶ "job X has changed"

The id of a server-sent event is the row's id, so a reconnecting watcher sends the last one it saw and gets the rest from
Postgres. Redis only wakes: a feed also polls every few seconds. A watcher holds no thread, no database connection and no buffer
of its own; one that reads more slowly than the job produces falls out of the ring and gets the rest from Postgres, page by page,
and one that does not read at all is dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import uuid
from collections import deque
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from weakref import WeakKeyDictionary

import redis.asyncio
from sqlalchemy import select
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.db import transaction
from app.errors import problem_json
from app.queue import PREFIX
from app.settings import get_settings
from app.tables import Event
from app.web.revocation import doorkeeper

log = logging.getLogger(__name__)

RING = 1024
"""Events of a job kept encoded while somebody watches it."""

PAGE = 500
LOOK_SECONDS = 3.0
"""Polling interval of a feed without wake-ups, so that a lost wake-up delays events by no more than this."""

KEEP_ALIVE_SECONDS = 15.0
STUCK_SECONDS = 30.0
"""A watcher that reads nothing for this long is dropped."""

PER_WATCHER_SECONDS = 5e-5
"""Pause between two broadcasts per watcher, so that a busy job with thousands of watchers sends larger pieces."""

_threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="watch")


def load(job_id: uuid.UUID, after: int, limit: int = PAGE) -> list[tuple[int, bytes]]:
    """Events after an id, in order, each encoded as one server-sent event."""
    with transaction() as session:
        rows = session.execute(
            select(Event.id, Event.key, Event.type, Event.attempt, Event.created_at, Event.data)
            .where(Event.job_id == job_id, Event.id > after)
            .order_by(Event.id)
            .limit(limit)
        ).all()
    return [(row.id, encode(row)) for row in rows]


def load_newest(job_id: uuid.UUID, limit: int) -> tuple[int, list[tuple[int, bytes]]]:
    """The newest events in order, and the id after which they are complete."""
    with transaction() as session:
        columns = (Event.id, Event.key, Event.type, Event.attempt, Event.created_at, Event.data)
        query = select(*columns).where(Event.job_id == job_id).order_by(Event.id.desc()).limit(limit + 1)
        rows = list(reversed(session.execute(query).all()))
    floor = rows[0].id if len(rows) > limit else 0
    return floor, [(row.id, encode(row)) for row in rows if row.id > floor]


def encode(row: Any) -> bytes:
    """One server-sent event: `data` is the event's fields with its id, type, attempt and time (seconds since 1970)."""
    data = problem_json(row.data) if row.type == "failed" else row.data
    said = {**(data or {}), "id": row.id, "type": row.type, "attempt": row.attempt, "at": round(row.created_at.timestamp(), 3)}
    return f"id: {row.id}\ndata: {json.dumps(said, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


class Watcher:
    """One open stream: the last event sent, and an asyncio event that wakes it."""

    __slots__ = ("bell", "gone", "seen")

    def __init__(self, seen: int) -> None:
        self.seen = seen
        self.bell = asyncio.Event()
        self.gone = False

    def leave(self, _: object = None) -> None:
        self.gone = True
        self.bell.set()


class Feed:
    """One job that somebody watches."""

    def __init__(self, job_id: uuid.UUID) -> None:
        self.job_id = job_id
        self.ring: deque[tuple[int, bytes]] = deque()
        self.floor = 0  # every event with a higher id, up to `last`, is in the ring
        self.last = 0
        self.beats = 0  # keep-alives so far
        self.watchers: set[Watcher] = set()
        self.changed = asyncio.Event()
        self.ready = asyncio.Event()
        self._joined: dict[int, bytes] = {}  # concatenated events after an id, shared by all watchers at that id
        self.task = asyncio.create_task(self._run(), name=f"feed-{job_id}")

    def since(self, seen: int) -> bytes:
        """The events after `seen`, which is not below the floor, ready to send."""
        if seen >= self.last:
            return b""
        if seen not in self._joined:
            self._joined[seen] = b"".join(text for number, text in self.ring if number > seen)
        return self._joined[seen]

    def take(self, fresh: Sequence[tuple[int, bytes]]) -> None:
        self.ring.extend(fresh)
        self.last = fresh[-1][0]
        while len(self.ring) > RING:
            self.floor = self.ring.popleft()[0]
        self._joined.clear()

    def ring_all(self) -> None:
        for watcher in self.watchers:
            watcher.bell.set()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        spoke = loop.time()
        while True:
            try:
                if not self.ready.is_set():
                    self.floor, newest = await loop.run_in_executor(_threads, load_newest, self.job_id, RING)
                    self.last = self.floor
                    if newest:
                        self.take(newest)
                    self.ready.set()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_SECONDS):
                        await self.changed.wait()
                self.changed.clear()
                while fresh := await loop.run_in_executor(_threads, load, self.job_id, self.last):
                    self.take(fresh)
                    self.ring_all()
                    spoke = loop.time()
                    await asyncio.sleep(max(0.02, PER_WATCHER_SECONDS * len(self.watchers)))
            except Exception as error:  # the database is unreachable for a moment: watchers stay, and get the events later
                log.warning("Events of job %s cannot be read: %s", self.job_id, error)
                await asyncio.sleep(1)
            if loop.time() - spoke > KEEP_ALIVE_SECONDS:
                spoke = loop.time()
                self.beats += 1
                self.ring_all()


class Hub:
    """The feeds of one process, and its one subscription."""

    def __init__(self) -> None:
        self.feeds: dict[uuid.UUID, Feed] = {}
        self.listener: asyncio.Task[None] | None = None

    @contextlib.asynccontextmanager
    async def watching(self, job_id: uuid.UUID, watcher: Watcher) -> AsyncIterator[Feed]:
        """The feed of a job, kept as long as one watcher is in it."""
        if job_id not in self.feeds:
            self.feeds[job_id] = Feed(job_id)
        feed = self.feeds[job_id]
        feed.watchers.add(watcher)
        if self.listener is None or self.listener.done():
            self.listener = asyncio.create_task(self._listen(), name="watch-redis")
        try:
            yield feed
        finally:
            feed.watchers.discard(watcher)
            if not feed.watchers and self.feeds.get(job_id) is feed:
                del self.feeds[job_id]
                feed.task.cancel()
            if not self.feeds and self.listener is not None:
                self.listener.cancel()
                self.listener = None

    async def _listen(self) -> None:
        """Wake the feeds of jobs that changed. After every reconnection all feeds, since a wake-up may have been missed."""
        url = get_settings().redis_url
        head = f"{PREFIX}job:"
        while url:
            try:
                async with redis.asyncio.Redis.from_url(url, socket_connect_timeout=5) as wire, wire.pubsub() as heard:
                    await heard.psubscribe(f"{head}*")
                    for feed in self.feeds.values():
                        feed.changed.set()
                    async for message in heard.listen():
                        name = message["channel"].decode() if message["type"] == "pmessage" else ""
                        if name.startswith(head):
                            self._wake(name.removeprefix(head))
            except (redis.RedisError, OSError) as error:
                log.info("Redis is unreachable, watchers poll: %s", error)
            await asyncio.sleep(1)

    def _wake(self, hexed: str) -> None:
        with contextlib.suppress(ValueError):
            feed = self.feeds.get(uuid.UUID(hex=hexed))
            if feed is not None:
                feed.changed.set()


_hubs: WeakKeyDictionary[asyncio.AbstractEventLoop, Hub] = WeakKeyDictionary()


def hub() -> Hub:
    """The hub of the running event loop."""
    return _hubs.setdefault(asyncio.get_running_loop(), Hub())


class EventStream(Response):
    """The stream of one job, from after the event `after`. The caller has checked that the job may be seen, and holds no session
    any more when it is sent.

    It is a response class of its own and not a StreamingResponse, so that a watcher costs one task and a small object.
    """

    media_type = "text/event-stream"

    def __init__(self, job_id: uuid.UUID, after: int = 0) -> None:
        self.status_code = 200
        self.background = None
        self.body = b""
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self.raw_headers = [item for item in self.raw_headers if item[0] != b"content-length"]
        self.job_id, self.after = job_id, after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = Watcher(self.after)
        disconnect = asyncio.create_task(_wait_for_disconnect(receive))
        disconnect.add_done_callback(watcher.leave)
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await _tell(send, b"retry: 2000\n\n")
            with doorkeeper().watching(scope, watcher.leave):
                async with hub().watching(self.job_id, watcher) as feed:
                    await self._follow(feed, watcher, send)
            if not disconnect.done():  # the watcher did not leave: it was dropped
                await _tell(send, b"", more=False)
        except TimeoutError:
            log.info("A watcher of job %s read nothing for %g seconds and was dropped.", self.job_id, STUCK_SECONDS)
        finally:
            disconnect.cancel()

    async def _follow(self, feed: Feed, watcher: Watcher, send: Send) -> None:
        await feed.ready.wait()
        beats = feed.beats
        while not watcher.gone:
            watcher.bell.clear()
            if watcher.seen < feed.floor:
                await self._catch_up(feed, watcher, send)
                continue
            seen, chunk = feed.last, feed.since(watcher.seen)
            if chunk:
                watcher.seen, beats = seen, feed.beats
                await _tell(send, chunk)
            elif beats != feed.beats:
                beats = feed.beats
                await _tell(send, b": still here\n\n")
            else:
                await watcher.bell.wait()

    async def _catch_up(self, feed: Feed, watcher: Watcher, send: Send) -> None:
        """One page of what the ring no longer holds, from Postgres."""
        rows = await asyncio.get_running_loop().run_in_executor(_threads, load, self.job_id, watcher.seen)
        watcher.seen = rows[-1][0] if rows else max(watcher.seen, feed.floor)
        if rows:
            await _tell(send, b"".join(text for _, text in rows))


async def _tell(send: Send, chunk: bytes, more: bool = True) -> None:
    async with asyncio.timeout(STUCK_SECONDS):
        await send({"type": "http.response.body", "body": chunk, "more_body": more})


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def after_id(last_event_id: str | None, after: int | None = None) -> int:
    """Where a stream begins: at the browser's `Last-Event-ID` when it reconnects, else at `?after=`, else at the start."""
    if last_event_id and last_event_id.isascii() and last_event_id.isdigit() and len(last_event_id) < 19:
        return int(last_event_id)
    return max(after or 0, 0)
