"""Many watchers of one job on one web process: `python -m benchmarks.watchers --watchers 10000 --seconds 30`.

A real web process on a real port, real connections, real rows. One step is recorded per interval; every watcher's copy
of every event is counted, and its delay is taken from the commit's clock to the moment the bytes are read.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import resource
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.servers import free_port, python, servers, tiny_model

AT = re.compile(rb'"id":(\d+),"type":"(\w+)","attempt":\d+,"at":([\d.]+)')


class Watcher(asyncio.Protocol):
    def __init__(self, request: bytes, opened: asyncio.Future[None]) -> None:
        self.request, self.opened, self.ids, self.delays, self.rest = request, opened, [], [], b""
        self.closed = self.leaving = False

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        now = time.time()
        if not self.opened.done() and b"retry:" in data:
            self.opened.set_result(None)
        text = self.rest + data
        end = text.rfind(b"\n\n")
        self.rest = text[end + 2 :] if end >= 0 else text
        for number, kind, at in AT.findall(text[: end + 2] if end >= 0 else b""):
            if kind == b"step":
                self.ids.append(int(number))
                self.delays.append(now - float(at))

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = not self.leaving
        if not self.opened.done():
            self.opened.set_exception(error or ConnectionError("closed"))


async def watch(port: int, path: str, key: str, count: int, ready: threading.Event, done: threading.Event, made: list[Watcher]) -> None:
    loop, gate = asyncio.get_running_loop(), asyncio.Semaphore(200)
    request = f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {key}\r\n\r\n".encode()

    async def one() -> Watcher:
        async with gate:
            opened: asyncio.Future[None] = loop.create_future()
            _, watcher = await loop.create_connection(lambda: Watcher(request, opened), "127.0.0.1", port)
            await opened
            return watcher

    made.extend(await asyncio.gather(*[one() for _ in range(count)]))
    ready.set()
    while not done.is_set():
        await asyncio.sleep(0.1)
    for watcher in made:
        watcher.leaving = True
        watcher.transport.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--watchers", type=int, default=1000)
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between two events")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with servers() as running:
        result = measure(options, running.folder)
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result))


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from app.db import transaction
    from app.jobs import lifecycle
    from app.kit import ids
    from app.web import auth
    from tests import lives
    from tests.factories import make_dataset, make_job

    with transaction() as session:
        user = auth.first_user(session)
        _, key = auth.create_key(session, user, "watchers")
        session.commit()
        job = make_job(session, user, tiny_model(folder / "data", session), make_dataset(session, user, folder / "data"))
    port = free_port()
    command = ["-m", "uvicorn", "app.main:create_app", "--factory", "--port", str(port), "--no-access-log", "--log-level", "warning"]
    command += ["--http", "app.web.http_protocol:Guarded", "--no-proxy-headers"]
    web = python(*command, "--timeout-graceful-shutdown", "2", log=folder / "web.log", LUTHIER_LOG_LEVEL="WARNING")
    try:
        _wait_for_port(port)
        idle = psutil.Process(web.pid).memory_info().rss
        ready, done = threading.Event(), threading.Event()
        made: list[Watcher] = []
        path = f"/v1/fine_tuning/jobs/{ids.public(ids.JOB, job.id)}/stream"
        thread = threading.Thread(target=lambda: asyncio.run(watch(port, path, key, options.watchers, ready, done, made)), daemon=True)
        began = time.monotonic()
        thread.start()
        if not ready.wait(600):
            raise SystemExit(f"the watchers could not all connect:\n{(folder / 'web.log').read_text()[-3000:]}")
        connected = time.monotonic() - began
        with transaction() as session:
            held = lifecycle.claim(session, job.id, "benchmark")
            lifecycle.record(session, held, 0, [lives.started()])
        before = sum(psutil.Process(web.pid).cpu_times()[:2])
        expected = int(options.seconds / options.interval)
        for n in range(1, expected + 1):
            with transaction() as session:
                lifecycle.record(session, held, n, list(lives.steps(n, n, every=expected + 1)))
            time.sleep(options.interval)
        settle(made, expected)
        full = psutil.Process(web.pid).memory_info().rss
        spent = sum(psutil.Process(web.pid).cpu_times()[:2]) - before
        done.set()
        thread.join(60)
    finally:
        web.terminate()
        web.wait(20)
    return report(made, expected, connected, idle, full, spent)


def settle(made: list[Watcher], expected: int, seconds: float = 120.0) -> None:
    """Wait until every watcher has heard everything, so that what is late is counted as late and not as lost."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and sum(len(w.ids) for w in made) < expected * len(made):
        time.sleep(0.5)


def report(found: list[Watcher], expected: int, connected: float, idle: int, full: int, spent: float) -> dict[str, Any]:
    delays = sorted(delay for watcher in found for delay in watcher.delays)
    cuts = statistics.quantiles(delays, n=100)
    return {
        "watchers": len(found),
        "events_each": expected,
        "delivered": len(delays),
        "lost": sum(expected - len(set(w.ids)) for w in found),
        "cut_off": sum(w.closed for w in found),
        "twice": sum(len(w.ids) - len(set(w.ids)) for w in found),
        "out_of_order": sum(w.ids != sorted(w.ids) for w in found),
        "p50_seconds": round(cuts[49], 4),
        "p99_seconds": round(cuts[98], 4),
        "most_seconds": round(delays[-1], 4),
        "connected_in_seconds": round(connected, 1),
        "idle_mb": round(idle / 2**20, 1),
        "kb_per_watcher": round((full - idle) / 1024 / max(len(found), 1), 1),
        "web_cpu_microseconds_per_delivery": round(spent / max(len(delays), 1) * 1e6, 1),
        "load_average": psutil.getloadavg()[0],
    }


def _wait_for_port(port: int) -> None:
    import socket

    for _ in range(300):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise SystemExit("the web process did not start")


if __name__ == "__main__":
    main()
