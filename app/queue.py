"""The Celery app and the names of its tasks. The bodies are in `worker/tasks.py`.

A message holds one id and only says "look at this": a claim in Postgres decides whether there is anything to do. So a message may
be lost (the reaper redelivers it) or come twice (the second claim finds nothing), and wiping Redis loses nothing.
"""

from __future__ import annotations

import functools
import logging
import time
import uuid
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry
from sqlalchemy import text
from sqlalchemy.orm import Session

from app import db
from app.kit import tracing
from app.settings import get_settings
from app.tables import Outbox

if TYPE_CHECKING:
    from celery import Celery

TRAIN = "luthier.train"
READ = "luthier.read"
FETCH = "luthier.fetch"
EXAMINE = "luthier.examine"
GENERATE = "luthier.generate"
PROMPT = "luthier.prompt"
DISTILL = "luthier.distill"
EVALUATE = "luthier.evaluate"
PREDICT = "luthier.predict"
INSPECT = "luthier.inspect"
EXPORT = "luthier.export"
MAIL = "luthier.mail"
WEBHOOK = "luthier.webhook"
TRACK = "luthier.track"
SEARCH = "luthier.search"

ROUTES = {
    TRAIN: "train", EVALUATE: "evaluate", READ: "data", INSPECT: "data", FETCH: "import", EXAMINE: "import",
    GENERATE: "generate", PROMPT: "generate", DISTILL: "generate", PREDICT: "generate", EXPORT: "export", MAIL: "data", WEBHOOK: "data",
    TRACK: "data", SEARCH: "data",
}  # fmt: skip
"""Task → queue. Each queue is read by workers of its own, so that long training never delays a short task, and slow or endless
model imports delay no upload. Evaluations are also read by train workers that have nothing else to do."""

PREFIX = "luthier:"
"""Prefix of all our keys and channels."""

OUTBOX_CHANNEL = "luthier_outbox"
"""The PostgreSQL channel that wakes the relay."""


def broker_url(redis_url: str) -> str:
    """The same server in Celery's notation, which writes a unix socket as `redis+socket://`."""
    parts = urlsplit(redis_url)
    if parts.scheme == "unix":
        return f"redis+socket://{parts.path}?virtual_host={(parts.query or 'db=0').removeprefix('db=')}"
    return redis_url


def make_celery() -> Celery:
    from celery import Celery

    settings = get_settings()
    app = Celery("luthier", broker=broker_url(settings.redis_url) if settings.redis_url else None)
    app.conf.update(
        task_acks_late=False,
        task_ignore_result=True,
        worker_disable_prefetch=True,
        worker_prefetch_multiplier=1,
        task_serializer="json",
        accept_content=["json"],
        broker_connection_max_retries=None,
        broker_connection_retry_on_startup=True,
        broker_channel_error_retry=True,  # a refusal too: a broker whose disk is full takes messages again once there is room
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_transport_options={
            "global_keyprefix": PREFIX,
            "socket_timeout": min(10, db.patience.broker),
            "socket_connect_timeout": min(5, db.patience.broker),
            "health_check_interval": 5,
            "retry_on_timeout": True,
        },
        task_routes={name: {"queue": queue} for name, queue in ROUTES.items()},
        worker_hijack_root_logger=False,
        worker_send_task_events=False,
        enable_utc=True,
    )
    return app


if TYPE_CHECKING:
    celery: Celery


def __getattr__(name: str) -> Any:
    """`queue.celery` is created on first access: the web process seldom needs it, and it is slow to import."""
    if name != "celery":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()["celery"] = made = make_celery()
    return made


log = logging.getLogger(__name__)


@functools.cache
def get_redis() -> redis.Redis:
    """The Redis client, for publishing, subscribing and short-lived streams. Nothing that must be kept is stored there."""
    url = get_settings().redis_url
    if not url:
        raise RuntimeError("LUTHIER_REDIS_URL is not set. Start the studio with `luthier up`, or point it at a Redis.")
    wait = db.patience.broker
    return redis.Redis.from_url(url, socket_timeout=wait, socket_connect_timeout=min(5, wait), health_check_interval=15, retry=once_more())


def once_more() -> Retry:
    """Reconnects once where a restarted server has closed the connection. A server that does not respond is not tried again."""
    return Retry(ConstantBackoff(0.1), 1, supported_errors=(redis.ConnectionError,))


def cannot_write(error: redis.RedisError) -> bool:
    """Whether Redis is reachable but refuses writes, because it cannot write its file. It refuses the PING of a new connection
    too, which looks like a connection error."""
    return any(str(e).startswith("MISCONF") for e in (error, error.__cause__))


def channel(kind: str, key: uuid.UUID) -> str:
    """The pub/sub channel that wakes the watchers of one object: `luthier:job:<hex>`."""
    return f"{PREFIX}{kind}:{key.hex}"


def enqueue(session: Session, task: str, key: uuid.UUID) -> None:
    """Enqueue `task(key)` as part of this transaction. The relay sends it after the commit, at least once.

    PostgreSQL delivers the NOTIFY when the transaction is committed, so the relay need not wait for its next poll.
    """
    session.add(Outbox(task=task, key=key, context=tracing.carried()))
    with session.no_autoflush:
        session.execute(text(f"NOTIFY {OUTBOX_CHANNEL}"))


def backlog(task: str) -> int:
    """Messages that wait in the queue of a task; 0 when Redis is unreachable, since then all of them may be lost."""
    try:
        return int(get_redis().llen(f"{PREFIX}{ROUTES[task]}"))
    except (redis.RedisError, RuntimeError):
        return 0


@functools.lru_cache(maxsize=4)
def _waker(url: str) -> redis.Redis:
    """A client of its own with short timeouts: a wake-up must never delay its sender."""
    return redis.Redis.from_url(url, socket_timeout=1, socket_connect_timeout=1, retry=once_more())


_silent_until = 0.0


def notify(session: Session, kind: str, key: uuid.UUID) -> None:
    """Wake the watchers of one object after this transaction is committed.

    A lost wake-up delays a watcher by a few seconds, since it also polls; so an unreachable Redis is only logged.
    """
    pending: set[str] = session.info.setdefault("luthier_wakes", set())
    name = channel(kind, key)
    if name in pending:
        return
    pending.add(name)

    def publish() -> None:
        global _silent_until
        pending.discard(name)
        url = get_settings().redis_url
        if not url or time.monotonic() < _silent_until:
            return
        try:
            _waker(url).publish(name, b"")
        except redis.RedisError as error:
            _silent_until = time.monotonic() + 2
            log.warning("No wake-up sent on %s: %s", name, error)

    db.on_commit(session, publish)
