"""What strangers can do to the web process before sign-in, and what a silent server does to it: `python -m benchmarks.door`.

The web process as `luthier up` starts it, with a soft limit of 1,024 descriptors, on a PostgreSQL and a Valkey of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import socket
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import httpx
import psutil

from benchmarks.servers import Servers, free_port, python, servers

GET = b"GET /healthz HTTP/1.1\r\nhost: 127.0.0.1\r\n"
ASKER = {"authorization": f"Bearer sk-luthier-{'0' * 32}-x"}
"""A key of the right shape, for which the database must be asked."""


class Door:
    """One web process and what is done to it."""

    def __init__(self, port: int, web: psutil.Process, running: Servers) -> None:
        self.port, self.web, self.running = port, web, running
        self.url = f"http://127.0.0.1:{port}"

    def requests_per_second(self, seconds: float = 5.0, connections: int = 16) -> dict[str, float]:
        async def one(end: float) -> int:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            done = 0
            while time.monotonic() < end:
                writer.write(GET + b"\r\n")
                await reader.readuntil(b'{"status":"ok"}')
                done += 1
            writer.close()
            return done

        async def all_() -> int:
            end = time.monotonic() + seconds
            return sum(await asyncio.gather(*[one(end) for _ in range(connections)]))

        before = sum(self.web.cpu_times()[:2])
        done = asyncio.run(all_())
        spent = sum(self.web.cpu_times()[:2]) - before
        return {"per_second": round(done / seconds), "web_cpu_microseconds_each": round(spent / done * 1e6)}

    def header_flood(self, megabytes: int = 200) -> dict[str, Any]:
        before, sent = self.web.memory_info().rss, 0
        line = b"x-header: " + b"y" * 8000 + b"\r\n"
        with self.connect(GET) as connection:
            with suppress(OSError):
                while sent < megabytes * 1e6:
                    connection.sendall(line)
                    sent += len(line)
            time.sleep(1)
            return {"sent_mb": round(sent / 1e6, 1), "rss_grew_mb": round((self.web.memory_info().rss - before) / 1e6, 1)}

    def half_lines(self, count: int = 1500, seconds: float = 30.0) -> dict[str, Any]:
        with ExitStack() as stack:
            held = [stack.enter_context(self.connect(GET[:10])) for _ in range(count)]
            time.sleep(seconds)
            return {"connections": count, "alive": sum(is_open(one) for one in held), "after_seconds": seconds}

    def answers_under_slow_ones(self, count: int = 200, turns: int = 200) -> dict[str, Any]:
        with ExitStack() as stack:
            for _ in range(count):
                stack.enter_context(self.connect(GET[:10]))
            taken = sorted(self.seconds("/healthz")[0] for _ in range(turns))
        return {"slow": count, "p50_ms": round(taken[turns // 2] * 1000, 1), "p99_ms": round(taken[int(turns * 0.99) - 1] * 1000, 1)}

    def silent_ones(self, count: int = 1100) -> dict[str, Any]:
        with ExitStack() as stack:
            made = 0
            for _ in range(count):
                with suppress(OSError):
                    stack.enter_context(self.connect())
                    made += 1
            time.sleep(1)
            seconds, status = self.seconds("/healthz")
        return {"silent": made, "healthz_status": status, "healthz_seconds": seconds}

    def guesses(self) -> dict[str, Any]:
        with httpx.Client(base_url=self.url, headers={"origin": self.url}, timeout=60) as asker:
            forged = Counter(wrong(asker, "owner", {"x-forwarded-for": f"203.0.113.{n}"}) for n in range(40))
            redis_flush(self.running)
            with ThreadPoolExecutor(60) as pool:
                at_once = Counter(pool.map(lambda _: wrong(asker, "owner"), range(60)))
            redis_flush(self.running)
        return {"40_forged_addresses": dict(forged), "60_at_once": dict(at_once)}

    def page_under_guesses(self, threads: int = 50, turns: int = 15) -> dict[str, Any]:
        stop, tried = threading.Event(), []

        def guess(n: int) -> None:
            with httpx.Client(base_url=self.url, headers={"origin": self.url}, timeout=120) as asker:
                while not stop.is_set():
                    tried.append(wrong(asker, f"name {n}", {"x-forwarded-for": f"203.0.113.{n}"}))

        going = [threading.Thread(target=guess, args=(n,), daemon=True) for n in range(threads)]
        for thread in going:
            thread.start()
        time.sleep(1)
        taken = [self.seconds("/sign-in")[0] for _ in range(turns)]
        stop.set()
        for thread in going:
            thread.join(120)
        redis_flush(self.running)
        return {
            "page_p50_seconds": round(statistics.median(taken), 2),
            "page_max_seconds": round(max(taken), 2),
            "tries": dict(Counter(tried)),
        }

    def silent_server(self, name: str, path: str, waiting: int = 60) -> dict[str, Any]:
        from app.web import templates as pages

        self.seconds(path)
        answered: list[float] = []
        with self.stopped(name):
            going = [threading.Thread(target=lambda: answered.append(self.seconds(path, 60)[0]), daemon=True) for _ in range(waiting)]
            for thread in going:
                thread.start()
            time.sleep(0.5)
            found: dict[str, Any] = {what: self.seconds(what, 40) for what in ("/healthz", pages.static("luthier.css"), "/readyz")}
            for thread in going:
                thread.join(60)
        return {**found, "waiting_were_answered_in": round(max(answered), 1)}

    @contextmanager
    def stopped(self, name: str) -> Iterator[None]:
        main = psutil.Process(self.running.processes[name].pid)
        main.suspend()
        children = main.children(recursive=True)
        try:
            for child in children:
                child.suspend()
            yield
        finally:
            for process in (*children, main):
                process.resume()

    def seconds(self, path: str, timeout: float = 30.0) -> tuple[float, Any]:
        """How long an answer took, and its status; the name of the error where there was none."""
        begun = time.monotonic()
        try:
            said: Any = httpx.get(f"{self.url}{path}", headers=ASKER if path.startswith("/v1") else {}, timeout=timeout).status_code
        except httpx.HTTPError as error:
            said = type(error).__name__
        return round(time.monotonic() - begun, 3), said

    def connect(self, sent: bytes = b"") -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        connection.sendall(sent)
        return connection


def wrong(asker: httpx.Client, name: str, headers: dict[str, str] | None = None) -> int:
    return asker.post("/sign-in", data={"name": name, "password": "x"}, headers=headers).status_code


def redis_flush(running: Servers) -> None:
    import redis

    redis.Redis.from_url(running.valkey.url).flushall()


def is_open(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return bool(connection.recv(1)) and False
    except BlockingIOError:
        return True
    except OSError:
        return False


def main() -> None:
    from app.ops.embedded.up import commands
    from app.settings import get_settings

    names: dict[str, Callable[[Door], dict[str, Any]]] = {
        "requests": Door.requests_per_second,
        "flood": Door.header_flood,
        "half lines": Door.half_lines,
        "slow": Door.answers_under_slow_ones,
        "guesses": Door.guesses,
        "page": Door.page_under_guesses,
        "postgres": lambda door: door.silent_server("postgres", "/v1/models"),
        "valkey": lambda door: door.silent_server("valkey", "/metrics"),
        "silent": Door.silent_ones,
    }
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("only", nargs="*", help=f"of {', '.join(names)}")
    chosen = parser.parse_args().only or list(names)
    with servers() as running:
        port = free_port()
        command = commands(get_settings())["web"]
        command[command.index("--port") + 1] = str(port)
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, hard), hard))  # as the shell gives it
        web = python("-m", *command, log=running.folder / "web.log", LUTHIER_LOG_LEVEL="WARNING")
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        try:
            door = Door(port, psutil.Process(web.pid), running)
            while door.seconds("/healthz")[1] != 200:
                time.sleep(0.2)
            for name in chosen:
                print(json.dumps({name: names[name](door)}), flush=True)
            print(json.dumps({"load_average": psutil.getloadavg()[0]}))
        finally:
            web.kill()
            web.wait()


if __name__ == "__main__":
    main()
