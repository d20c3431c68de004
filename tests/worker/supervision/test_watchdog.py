"""When a worker counts as deaf, and that it ends even where it does not hear the request. A real deaf one: test_supervise.py."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from celery.worker import state

from app import queue
from tests.conftest import PROJECT
from worker.supervision import watchdog

PATIENCE = 0.2


class Request:
    """Celery keeps running tasks in a weak set, so any object that lives will do."""


@pytest.fixture
def waiting(session) -> str:
    key = f"{queue.PREFIX}train"
    queue.get_redis().lpush(key, "message")
    return key


def patient(hearing: watchdog.Hearing) -> bool:
    """Its answer after more than its patience."""
    hearing.is_deaf()
    time.sleep(PATIENCE * 1.5)
    return hearing.is_deaf()


def test_a_free_worker_that_leaves_messages_lying_is_deaf(waiting):
    hearing = watchdog.Hearing(["train"], 1, PATIENCE)
    assert not hearing.is_deaf(), "not at the first look"
    assert patient(hearing)


@pytest.mark.parametrize("why", ["busy", "takes", "nothing waits", "no broker"])
def test_a_worker_with_a_reason_is_not_deaf(waiting, why, monkeypatch):
    hearing, running = watchdog.Hearing(["train"], 1, PATIENCE), Request()
    if why == "busy":
        state.active_requests.add(running)
    elif why == "takes":
        monkeypatch.setattr(state, "all_total_count", [hearing.taken])
        hearing.is_deaf()
        time.sleep(PATIENCE * 1.5)
        state.all_total_count[0] += 1
    elif why == "nothing waits":
        queue.get_redis().delete(waiting)
    else:
        monkeypatch.setenv("LUTHIER_REDIS_URL", "unix:///nowhere?db=0")
        queue.get_redis.cache_clear()
        queue.get_settings.cache_clear()
    assert not (hearing.is_deaf() if why == "takes" else patient(hearing))
    state.active_requests.discard(running)


def test_a_worker_that_hears_not_even_the_signal_is_cut_short():
    code = "import signal; from worker.supervision import watchdog; signal.signal(signal.SIGTERM, signal.SIG_IGN); watchdog.leave(0.1)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT).returncode == watchdog.DEAF
