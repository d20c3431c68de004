"""The Celery worker: `celery -A worker.main worker -Q train,evaluate --pool=prefork -c 1`, or the queues evaluate, data, import, export and
generate.

The train worker's processes never import torch: each attempt trains in a process of its own.
"""

from __future__ import annotations

import mmap
import os
import threading
from typing import Any

from celery import signals

from app.db import get_engine
from app.errors import StudioError
from app.kit import logs
from app.kit.child_process import die_with_parent
from app.machines import heartbeats
from app.machines.gpus import CUDA_ORDER
from app.queue import celery, get_redis
from app.settings import get_settings
from app.storage import objects, sweeping
from app.storage.objects import StorageRefuses
from worker import tasks
from worker.kernels.cpu import warmup
from worker.supervision import watchdog

app = celery
os.environ |= CUDA_ORDER

_leaving = mmap.mmap(-1, 1)
"""One byte shared with the pool's processes, which are forked after this line: 1 when the worker was asked to leave. Celery
notifies only its main process, and waits for running tasks; with the byte a supervisor stops its trainer, which saves, instead of
being waited for."""

_main = os.getpid()


def going_down() -> bool:
    return _leaving[0] == 1


tasks.going_down = going_down


@signals.worker_shutting_down.connect
def _leave(**_: Any) -> None:
    _leaving[0] = 1


@signals.celeryd_init.connect
def _check(**_: Any) -> None:
    try:
        objects.check()
    except StorageRefuses as error:
        raise SystemExit(f"{error.message} {error.hint}") from error


def _check_launcher(queues: list[str]) -> None:
    from worker import launchers  # what it needs, the other workers need not

    try:
        launchers.current().check(queues)
    except StudioError as error:
        raise SystemExit(f"{error.message} {error.hint}") from error


@signals.setup_logging.connect
def _log(**_: Any) -> None:
    logs.configure()


@signals.worker_process_init.connect
def _begin_process(**_: Any) -> None:
    """A forked process shares no connection with its parent, and dies with it, because the parent's lease expires."""
    get_engine.cache_clear()
    get_redis.cache_clear()
    die_with_parent(_main)()


@signals.worker_ready.connect
def _begin(sender: Any = None, **_: Any) -> None:
    """Announce the queues that this worker serves, and start the threads and processes that serve them."""
    if sender is None:
        return
    queues = list(sender.app.amqp.queues.consume_from)
    if get_settings().launcher != "local" and "train" in queues:
        _check_launcher(queues)
    for queue in queues:
        heartbeats.keep_saying(queue)
    sweeping.begin(threading.Event(), cache_only=True)
    watchdog.watch(watchdog.Hearing(queues, sender.pool.num_processes, get_settings().deaf_seconds), going_down)
    if "train" in queues:
        warmup.begin()
