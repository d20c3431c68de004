"""Many watchers of one job: `python -m benchmarks.watchers --watchers 10000 --seconds 30 [--webs 3]`.

Real web processes behind one real port, real connections, real rows. One step is recorded per interval; every watcher's copy
of every event is counted, and its delay is taken from the commit's clock to the moment the bytes are read. With several `--webs` the kernel
gives each connection to one of them. Meanwhile pages are opened, and files are uploaded in pieces, each over a connection of its own, so that
any process may be asked for any part.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import os
import re
import resource
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.servers import PROJECT, free_port, servers, tiny_model

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
    parser.add_argument("--webs", type=int, default=1, help="web processes behind the one port")
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
        link = auth.new_sign_in_link(session, user)
        session.commit()
    port = free_port()
    webs = [start_web(port, folder / "web.log") for _ in range(options.webs)]
    try:
        for web in webs:
            _wait_for_web(web, folder / "web.log")
        idle = memory_of(webs)
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
        others = OtherUsers(f"http://127.0.0.1:{port}", link, ids.public(ids.JOB, job.id), key)
        others.start()
        before = processor_of(webs)
        expected = int(options.seconds / options.interval)
        for n in range(1, expected + 1):
            with transaction() as session:
                lifecycle.record(session, held, n, list(lives.steps(n, n, every=expected + 1)))
            time.sleep(options.interval)
        settle(made, expected)
        full, spent = memory_of(webs), processor_of(webs) - before
        others.end()
        shares = [len(psutil.Process(web.pid).net_connections("tcp")) for web in webs]
        done.set()
        thread.join(60)
    finally:
        for web in webs:
            web.terminate()
        for web in webs:
            web.wait(20)
    return report(made, expected, connected, idle, full, spent) | {"webs": options.webs, "connections_of_each": shares} | others.report()


def start_web(port: int, log: Path) -> subprocess.Popen:
    """A web process at a port that others may share: the kernel gives each new connection to one of them."""
    door = socket.socket()
    door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    door.bind(("127.0.0.1", port))
    command = [
        sys.executable,
        "-m",
        "uvicorn",
        "app.main:create_app",
        "--factory",
        "--fd",
        str(door.fileno()),
        "--no-access-log",
        "--log-level",
        "warning",
    ]
    command += ["--http", "app.web.http_protocol:Guarded", "--no-proxy-headers", "--timeout-graceful-shutdown", "2"]
    with log.open("ab") as out:
        environment = os.environ | {"LUTHIER_LOG_LEVEL": "WARNING"}
        web = subprocess.Popen(command, cwd=PROJECT, env=environment, pass_fds=[door.fileno()], stdout=out, stderr=out)
    door.close()
    return web


def memory_of(webs: list[subprocess.Popen]) -> int:
    return sum(psutil.Process(web.pid).memory_info().rss for web in webs)


def processor_of(webs: list[subprocess.Popen]) -> float:
    return sum(sum(psutil.Process(web.pid).cpu_times()[:2]) for web in webs)


class OtherUsers(threading.Thread):
    """People who open pages and upload files meanwhile, each request over a connection of its own."""

    def __init__(self, url: str, link: str, job: str, key: str) -> None:
        super().__init__(daemon=True)
        self.url, self.link, self.key = url, link, key
        self.pages = ["/", f"/jobs/{job}", "/jobs", "/datasets", "/models", "/jobs/new"]
        self.spent: list[float] = []
        self.uploads = self.lost = 0
        self.over = threading.Event()

    def run(self) -> None:
        with httpx.Client(base_url=self.url, follow_redirects=True, timeout=60) as first:
            first.get(self.link).raise_for_status()
            cookies = dict(first.cookies)
        while not self.over.is_set():
            for page in self.pages:
                began = time.perf_counter()
                with httpx.Client(base_url=self.url, cookies=cookies, timeout=60) as one:
                    one.get(page).raise_for_status()
                self.spent.append(time.perf_counter() - began)
            self.uploads += 1
            self.lost += not self._upload()
            time.sleep(0.2)

    def _upload(self) -> bool:
        """A file in four pieces (tus 1.0), each sent over a connection of its own; whether it came as it was."""
        body = b"".join(b'{"text": "%s"}\n' % os.urandom(493).hex().encode() for _ in range(400))
        name = base64.b64encode(b"rows.jsonl").decode()
        begun = self._ask("POST", "/v1/tus", {"upload-length": str(len(body)), "upload-metadata": f"filename {name}"})
        place = begun.headers["location"].removeprefix(self.url)
        for at in range(0, len(body), 100_000):
            sent = int(self._ask("HEAD", place, {}).headers["upload-offset"])
            if sent != at:
                return False
            piece = {"upload-offset": str(at), "content-type": "application/offset+octet-stream"}
            self._ask("PATCH", place, piece, body[at : at + 100_000])
        return self._ask("HEAD", place, {}).headers["upload-offset"] == str(len(body))

    def _ask(self, method: str, path: str, headers: dict[str, str], body: bytes = b"") -> httpx.Response:
        with httpx.Client(base_url=self.url, timeout=60) as one:
            about = {"authorization": f"Bearer {self.key}", "tus-resumable": "1.0.0", **headers}
            return one.request(method, path, headers=about, content=body).raise_for_status()

    def end(self) -> None:
        self.over.set()
        self.join(60)

    def report(self) -> dict[str, Any]:
        cuts = statistics.quantiles(self.spent, n=100)
        told = {"pages": len(self.spent), "page_p50_ms": round(1000 * cuts[49], 1), "page_p95_ms": round(1000 * cuts[94], 1)}
        return told | {"uploads_in_pieces": self.uploads, "uploads_lost": self.lost}


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


def _wait_for_web(web: subprocess.Popen, log: Path) -> None:
    """Until it listens: the port is shared, so that of another one would not do."""
    for _ in range(600):
        with contextlib.suppress(psutil.Error):
            if any(one.status == "LISTEN" for one in psutil.Process(web.pid).net_connections("tcp")):
                return
        time.sleep(0.1)
    raise SystemExit(f"the web process did not start:\n{log.read_text()[-3000:]}")


if __name__ == "__main__":
    main()
