"""F10: the clock of the machine that works jumps by an hour, ahead and back, while a job trains there. A real worker and relay, whose wall
clock is made wrong by a library (`wrong_clock.c`); database, broker and this process have the right one."""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import func, select

from app import leases
from app.db import transaction
from app.jobs import service as jobs
from app.machines import heartbeats
from app.settings import PROJECT, get_settings
from app.tables import Job
from tests.conftest import wait_until
from tests.worker.supervision.test_train_attempt import (  # noqa: F401  # fixtures among them
    new_job,
    now_of,
    processes,
    running_trainers,
    said,
)

SOURCE = Path(__file__).with_name("wrong_clock.c")
HOUR = 3600
LEASE_SECONDS, REAP_SECONDS = 3.0, 0.5
"""Those of `processes`."""


def built() -> Path:
    library = PROJECT / ".pytest_cache" / f"wrong_clock-{SOURCE.stat().st_mtime_ns}.so"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        made = library.with_suffix(f".{os.getpid()}")
        subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-Wall", "-Werror", str(SOURCE), "-o", str(made)], check=True)
        made.rename(library)
    return library


@pytest.fixture
def wrong_by(tmp_path, monkeypatch) -> Callable[[int], None]:
    """Set by how many seconds the clock of every process that is started from now on is wrong; at any time."""
    if shutil.which("cc") is None:
        pytest.skip("cc is missing, which compiles the wrong clock")
    file = tmp_path / "clock_offset"
    file.write_bytes(struct.pack("<q", 0))

    def jump(seconds: int) -> None:
        with file.open("r+b") as opened:
            opened.write(struct.pack("<q", seconds))

    monkeypatch.setenv("LD_PRELOAD", str(built()))
    monkeypatch.setenv("CLOCK_OFFSET", str(file))
    told = subprocess.run(["date", "+%s"], capture_output=True, text=True, env={**os.environ, "CLOCK_OFFSET": ""}, check=True)
    jump(HOUR)
    ahead = subprocess.run(["date", "+%s"], capture_output=True, text=True, check=True)
    assert HOUR <= int(ahead.stdout) - int(told.stdout) < HOUR + 60, "the library changes no clock"
    return jump


def lease_left(job: Job) -> float:
    """Seconds until the lease passes, by the database."""
    with transaction() as session:
        left = func.extract("epoch", Job.lease_until - leases.now())
        return float(session.scalar(select(left).where(Job.id == job.id)) or 0.0)


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("seed", "jumps"), [(1, 1), *(pytest.param(seed, 12, marks=pytest.mark.fault) for seed in range(2, 6))])
def test_a_clock_that_jumps_by_an_hour_takes_no_job_from_its_worker(wrong_by, new_job, request, user, seed, jumps):  # noqa: F811
    draw = random.Random(seed)
    wrong_by(draw.choice((HOUR, -HOUR)))
    job = new_job(epochs=1000)
    running = request.getfixturevalue("processes")  # from here on, with the wrong clock
    wait_until(lambda: said(job, "saved"), what="a checkpoint", seconds=90)
    for seen in (*heartbeats.machines(), *(w for w in heartbeats.alive() if w.queue == "train")):
        silent = seen.silent_seconds if isinstance(seen, heartbeats.Worker) else seen[1]
        assert silent < 60, "a worker whose clock is wrong is taken for silent"
    for _ in range(jumps):
        wrong_by(draw.choice((HOUR, -HOUR, 0)) + draw.randrange(-30, 31))
        before = now_of(job).step
        time.sleep(LEASE_SECONDS * draw.uniform(1.0, 1.4) + REAP_SECONDS)
        row = now_of(job)
        assert (row.status, row.attempt, row.deaths) == ("running", 1, 0) and row.step > before, said(job, "lost")
        assert 0 < lease_left(job) <= LEASE_SECONDS, "leases are by the clock of the database"

    wrong_by(draw.choice((HOUR, -HOUR)))
    (trainer,) = running_trainers(job)
    running.worker.kill()
    died = time.monotonic()
    running.start_worker()
    wait_until(lambda: now_of(job).attempt == 2, what="the next attempt, a lease later and not an hour", seconds=30)
    assert time.monotonic() - died > LEASE_SECONDS / 3, "its lease had not passed"
    assert trainer not in running_trainers(job), "the trainer of the dead worker goes on"
    wait_until(lambda: len(said(job, "started")) == 2, what="the second start", seconds=60)
    assert said(job, "started")[1].data["resumed_from"] > 0 and len(said(job, "lost")) == 1
    with transaction() as session:
        jobs.cancel(session, user, job.id)
    wait_until(lambda: now_of(job).status == "cancelled", what="the end", seconds=get_settings().stop_grace_seconds + 20)
    assert not running_trainers(job)
