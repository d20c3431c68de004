"""Many tiny jobs under kills: `python -m benchmarks.chaos --jobs 20 --seconds 120 --workers 2 --seed 1`.

Everything is real: PostgreSQL with its log flushed, Valkey, the relay, Celery workers and trainers on the small model.
At random moments a worker, a trainer, the relay, Valkey or PostgreSQL is killed with `kill -9`, or Valkey is wiped.
Then everything is left alone until the queue is empty. Printed: jobs lost (never ended), ended wrongly, results that are
there twice, writes of a stale attempt, attempts with an orphan left behind, and how long the drain took.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.servers import Servers, python, servers, tiny_model, wait_for_database

RUN = {
    "epochs": 2, "max_tokens_per_step": 64, "evaluations_per_epoch": 2, "samples": 0, "early_stopping_patience": 0, "validation_fraction": 0.2,
}  # fmt: skip
LEASE = {
    "LUTHIER_LEASE_SECONDS": "6", "LUTHIER_BEAT_SECONDS": "1", "LUTHIER_REAP_SECONDS": "1", "LUTHIER_ANNOUNCE_AGAIN_SECONDS": "4",
}  # fmt: skip


class Studio:
    """The processes that may die, started again when they do."""

    def __init__(self, running: Servers, workers: int) -> None:
        self.servers, self.log = running, running.folder / "studio.log"
        self.relay = self._relay()
        self.workers = [self._worker(n) for n in range(workers)]
        self.kills: Counter[str] = Counter()

    def _relay(self) -> Any:
        return python("-m", "app.relay", log=self.log)

    def _worker(self, n: int) -> Any:
        # fmt: off
        return python(
            "-m", "celery", "-A", "worker.main", "worker", "-Q", "train", "--pool=prefork", "-c", "1", "-n", f"train{n}@chaos",
            "--without-gossip", "--without-mingle", log=self.log,
        )
        # fmt: on

    def tend(self) -> None:
        """Start again what is gone, as `luthier up` does."""
        if self.relay.poll() is not None:
            self.relay = self._relay()
        self.workers = [w if w.poll() is None else self._worker(n) for n, w in enumerate(self.workers)]
        for name, process in self.servers.processes.items():
            if process.poll() is not None:
                self.servers.start(name)
                if name == "postgres":
                    wait_for_database(self.servers.postgres.url_of("postgres"), 60)

    def hurt(self, draw: random.Random) -> str:
        what = draw.choices(["worker", "child", "trainer", "relay", "valkey", "wipe", "postgres"], [3, 2, 5, 1, 1, 1, 1])[0]
        if what == "worker":
            draw.choice(self.workers).kill()
        elif what in ("child", "trainer"):
            self._kill_below(draw.choice(self.workers).pid, trainer=what == "trainer")
        elif what == "relay":
            self.relay.kill()
        elif what == "wipe":
            import redis

            with suppress(redis.RedisError):
                redis.Redis.from_url(self.servers.valkey.url).flushall()
        else:
            self.servers.kill(what)
        self.kills[what] += 1
        return what

    def _kill_below(self, pid: int, trainer: bool) -> None:
        with suppress(psutil.Error):
            for process in psutil.Process(pid).children(recursive=True):
                if ("worker.run" in " ".join(process.cmdline())) == trainer:
                    process.kill()

    def stop(self) -> None:
        for process in (*self.workers, self.relay):
            if process.poll() is None:
                process.terminate()
        for process in (*self.workers, self.relay):
            process.wait(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=120.0, help="how long things are killed")
    parser.add_argument("--pause", type=float, default=8.0, help="mean seconds between two kills")
    parser.add_argument("--drain", type=float, default=600.0, help="most seconds to wait afterwards")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with servers(fast=False, **LEASE) as running:
        result = chaos(options, running)
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result))


def chaos(options: argparse.Namespace, running: Servers) -> dict[str, Any]:
    from app.db import transaction
    from app.web import auth
    from tests.factories import make_dataset, make_job

    draw = random.Random(options.seed)
    with transaction() as session:
        user = auth.first_user(session)
        session.commit()
        model = tiny_model(running.folder / "data", session)
        dataset = make_dataset(session, user, running.folder / "data", rows=24)
        keys = [make_job(session, user, model, dataset, **RUN, seed=n % 3).id for n in range(options.jobs)]
    studio = Studio(running, options.workers)
    try:
        until = time.monotonic() + options.seconds
        while time.monotonic() < until:
            time.sleep(draw.expovariate(1 / options.pause))
            print(f"{time.monotonic() - until + options.seconds:6.1f} s  kill {studio.hurt(draw)}", flush=True)
            time.sleep(0.3)
            studio.tend()
        began = time.monotonic()
        while time.monotonic() - began < options.drain and _waiting():
            time.sleep(1)
            studio.tend()
        drained = time.monotonic() - began
        orphans = _trainers(str(running.folder))
    finally:
        studio.stop()
    return verdict(keys, dict(studio.kills), drained, orphans)


def _waiting() -> int:
    from sqlalchemy import func, select
    from sqlalchemy.exc import DBAPIError

    from app.db import transaction
    from app.tables import Job

    try:
        with transaction() as session:
            return session.scalar(select(func.count()).select_from(Job).where(Job.status.in_(("queued", "running"))))
    except DBAPIError:
        return 1


def _trainers(mark: str) -> int:
    count = 0
    for process in psutil.process_iter(["cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or [])
        count += "worker.run" in line and mark in line and process.info["status"] != psutil.STATUS_ZOMBIE
    return count


def verdict(keys: list[Any], kills: dict[str, int], drained: float, orphans: int) -> dict[str, Any]:
    """Read the truth once all is quiet. Jobs of one seed must have one and the same adapter, however often they died."""
    from sqlalchemy import select

    from app.db import transaction
    from app.tables import Event, Job, Model

    with transaction() as session:
        rows = session.scalars(select(Job).where(Job.id.in_(keys))).all()
        models = session.execute(select(Model.job_id, Model.adapter_sha256).where(Model.job_id.in_(keys))).all()
        events = session.execute(select(Event.job_id, Event.type, Event.attempt).where(Event.job_id.in_(keys)).order_by(Event.id)).all()
    stale, newest = 0, Counter()
    for job_id, _, attempt in events:
        stale += attempt < newest[job_id]
        newest[job_id] = max(newest[job_id], attempt)
    seeds = {row.id: row.spec["run"]["seed"] for row in rows}
    hashes: dict[int, set[str]] = {}
    for job_id, sha256 in models:
        hashes.setdefault(seeds[job_id], set()).add(sha256)
    finished = Counter(job_id for job_id, kind, _ in events if kind == "finished")
    states = Counter(row.status for row in rows)
    return {
        "jobs": len(keys),
        "states": dict(states),
        "lost": sum(row.status in ("queued", "running") for row in rows) + len(keys) - len(rows),
        "given_up_after_three_deaths": states["failed"],
        "errors": sorted({row.error["message"][:160] for row in rows if row.error}),
        "double": sum(n > 1 for n in finished.values()) + len(models) - len({m[0] for m in models}),
        "succeeded_without_a_model": states["succeeded"] - len(models),
        "stale_writes": stale,
        "different_adapters_per_seed": {seed: len(found) for seed, found in sorted(hashes.items())},
        "attempts": dict(sorted(Counter(row.attempt for row in rows).items())),
        "kills": kills,
        "orphans": orphans,
        "drain_seconds": round(drained, 1),
        "load_average": psutil.getloadavg()[0],
    }


if __name__ == "__main__":
    main()
