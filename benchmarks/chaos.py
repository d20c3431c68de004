"""Many tiny jobs under kills: `python -m benchmarks.chaos --jobs 20 --seconds 120 --workers 2 --seed 1`.

Everything is real: PostgreSQL with its log flushed, Valkey, the relay, Celery workers and trainers on the small model.
Half of the jobs are ordered before, half by a client of the web process that orders each until it is answered. At random
moments a worker, a trainer, the relay, the web process, Valkey or PostgreSQL is killed with `kill -9`, Valkey is wiped, or a
worker is stopped for longer than its lease and goes on. Then everything is left alone until the queue is empty. Printed: jobs
lost (never ended), ended wrongly, orders and results that are there twice, writes of a stale attempt, attempts with an orphan
left behind, and how long the drain took. Exit code 1 where something of this was found.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.servers import Servers, free_port, python, servers, tiny_model, trainers, wait_for_database

RUN = {
    "epochs": 2, "max_tokens_per_step": 64, "evaluations_per_epoch": 2, "samples": 0, "early_stopping_patience": 0, "validation_fraction": 0.2,
}  # fmt: skip
LEASE = {
    "LUTHIER_LEASE_SECONDS": "6", "LUTHIER_BEAT_SECONDS": "1", "LUTHIER_REAP_SECONDS": "1", "LUTHIER_ANNOUNCE_AGAIN_SECONDS": "4",
}  # fmt: skip
STOPPED_SECONDS = 1.5 * float(LEASE["LUTHIER_LEASE_SECONDS"])
BLOWS = {"worker": 3, "child": 2, "trainer": 5, "stop": 2, "relay": 1, "web": 1, "valkey": 1, "wipe": 1, "postgres": 1}
"""What happens, and how often in comparison."""


class Studio:
    """The processes that may die, started again when they do."""

    def __init__(self, running: Servers, workers: int) -> None:
        self.servers, self.log = running, running.folder / "studio.log"
        self.port = free_port()
        self.relay, self.web = self._relay(), self._web()
        self.workers = [self._worker(n) for n in range(workers)]
        self.kills: Counter[str] = Counter()

    def _relay(self) -> Any:
        return python("-m", "app.relay", log=self.log)

    def _web(self) -> Any:
        command = [
            "-m",
            "uvicorn",
            "app.main:create_app",
            "--factory",
            "--port",
            str(self.port),
            "--no-access-log",
            "--log-level",
            "warning",
        ]
        return python(*command, log=self.log)

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
        if self.web.poll() is not None:
            self.web = self._web()
        self.workers = [w if w.poll() is None else self._worker(n) for n, w in enumerate(self.workers)]
        for name, process in self.servers.processes.items():
            if process.poll() is not None:
                self.servers.start(name)
                if name == "postgres":
                    wait_for_database(self.servers.postgres.url_of("postgres"), 60)

    def hurt(self, draw: random.Random) -> str:
        what = draw.choices([*BLOWS], [*BLOWS.values()])[0]
        if what == "worker":
            draw.choice(self.workers).kill()
        elif what in ("child", "trainer"):
            self._kill_below(draw.choice(self.workers).pid, trainer=what == "trainer")
        elif what == "stop":
            self._stop_for_a_while(draw.choice(self.workers).pid)
        elif what in ("relay", "web"):
            getattr(self, what).kill()
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

    def _stop_for_a_while(self, pid: int) -> None:
        """A worker and all that it started stand still for longer than a lease, as on a machine that swaps, and go on."""
        with suppress(psutil.Error):
            worker = psutil.Process(pid)
            those = [worker, *worker.children(recursive=True)]
            for step in (signal.SIGSTOP, signal.SIGCONT):
                for process in those:
                    with suppress(psutil.NoSuchProcess):
                        process.send_signal(step)
                time.sleep(STOPPED_SECONDS if step == signal.SIGSTOP else 0)

    def stop(self) -> None:
        those = (*self.workers, self.relay, self.web)
        for process in those:
            if process.poll() is None:
                process.terminate()
        for process in those:
            process.wait(60)


class Client(threading.Thread):
    """Orders jobs, each with an idempotency key, again and again until it is told of it."""

    def __init__(self, port: int, key: str, orders: list[dict[str, Any]], seconds: float) -> None:
        super().__init__(daemon=True)
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}/v1", headers={"authorization": f"Bearer {key}"}, timeout=20)
        self.orders, self.pause, self.told = orders, seconds / max(1, len(orders)), []
        self.asked, self.refused = 0, ""

    def run(self) -> None:
        for number, order in enumerate(self.orders):
            time.sleep(self.pause)
            while (made := self._ask(number, order)) is None:
                time.sleep(0.5)
            self.told.append(made)

    def _ask(self, number: int, order: dict[str, Any]) -> str | None:
        self.asked += 1
        with suppress(httpx.HTTPError):
            answer = self.http.post("/fine_tuning/jobs", json=order, headers={"idempotency-key": f"order {number}"})
            if answer.status_code == 200:
                return str(answer.json()["id"])
            if answer.status_code < 500:
                self.refused = answer.text
                raise SystemExit
        return None


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
    sys.exit(1 if faults(result) else 0)


def faults(result: dict[str, Any]) -> list[str]:
    """What of a result must not be."""
    none = ("lost", "double", "double_orders", "succeeded_without_a_model", "stale_writes", "orphans")
    found = [name for name in none if result[name]]
    found += ["adapters_per_recipe"] if any(count != 1 for count in result["adapters_per_recipe"]) else []
    ended = {"succeeded", *(["failed"] if all("without progress" in error for error in result["errors"]) else [])}
    return found + (["states"] if set(result["states"]) - ended else [])


def chaos(options: argparse.Namespace, running: Servers) -> dict[str, Any]:
    from app.db import transaction
    from app.kit import ids
    from app.web import auth
    from tests.factories import make_dataset, make_job

    draw = random.Random(options.seed)
    with transaction() as session:
        user = auth.first_user(session)
        session.commit()
        model = tiny_model(running.folder / "data", session)
        dataset = make_dataset(session, user, running.folder / "data", rows=24)
        before, after = options.jobs - options.jobs // 2, options.jobs // 2
        for n in range(before):
            make_job(session, user, model, dataset, **RUN, seed=n % 3)
        _, key = auth.create_key(session, user, "chaos")
        named = {"model": model.name, "dataset_id": ids.public(ids.DATASET, dataset.id), "strategy": {"name": "lora", "rank": 4}}
        orders = [{**named, "run": RUN, "seed": n % 3} for n in range(after)]
    studio = Studio(running, options.workers)
    client = Client(studio.port, key, orders, options.seconds)
    try:
        client.start()
        until = time.monotonic() + options.seconds
        while time.monotonic() < until:
            time.sleep(draw.expovariate(1 / options.pause))
            print(f"{time.monotonic() - until + options.seconds:6.1f} s  kill {studio.hurt(draw)}", flush=True)
            time.sleep(0.3)
            studio.tend()
        began = time.monotonic()
        while time.monotonic() - began < options.drain and (client.is_alive() or _waiting()):
            time.sleep(1)
            studio.tend()
        drained = time.monotonic() - began
        orphans = len(trainers(str(running.folder)))
    finally:
        studio.stop()
    if client.refused:
        raise SystemExit(f"An order was refused: {client.refused}")
    found = verdict(options.jobs, dict(studio.kills), drained, orphans)
    return found | {
        "orders_sent": client.asked,
        "double_orders": len(client.told) - len(set(client.told)) + max(0, found["rows"] - options.jobs),
    }


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


def verdict(jobs: int, kills: dict[str, int], drained: float, orphans: int) -> dict[str, Any]:
    """Read the truth once all is quiet. Jobs of one recipe, seed included, must have one and the same adapter, however often they died."""
    from sqlalchemy import select

    from app.db import transaction
    from app.tables import Event, Job, Model

    with transaction() as session:
        rows = session.scalars(select(Job)).all()
        models = session.execute(select(Model.job_id, Model.adapter_sha256).where(Model.job_id.is_not(None))).all()
        events = session.execute(select(Event.job_id, Event.type, Event.attempt).order_by(Event.id)).all()
    stale, newest = 0, Counter()
    for job_id, _, attempt in events:
        stale += attempt < newest[job_id]
        newest[job_id] = max(newest[job_id], attempt)
    recipes = {row.id: json.dumps([row.spec.get(part) for part in ("run", "strategy", "split")], sort_keys=True) for row in rows}
    hashes: dict[str, set[str]] = {}
    for job_id, sha256 in models:
        hashes.setdefault(recipes[job_id], set()).add(sha256)
    finished = Counter(job_id for job_id, kind, _ in events if kind == "finished")
    states = Counter(row.status for row in rows)
    return {
        "jobs": jobs,
        "rows": len(rows),
        "states": dict(states),
        "lost": sum(row.status in ("queued", "running") for row in rows) + max(0, jobs - len(rows)),
        "given_up_after_three_deaths": states["failed"],
        "errors": sorted({row.error["message"][:160] for row in rows if row.error}),
        "double": sum(n > 1 for n in finished.values()) + len(models) - len({m[0] for m in models}),
        "succeeded_without_a_model": states["succeeded"] - len(models),
        "stale_writes": stale,
        "adapters_per_recipe": sorted(len(found) for found in hashes.values()),
        "attempts": dict(sorted(Counter(row.attempt for row in rows).items())),
        "kills": kills,
        "orphans": orphans,
        "drain_seconds": round(drained, 1),
        "load_average": psutil.getloadavg()[0],
    }


if __name__ == "__main__":
    main()
