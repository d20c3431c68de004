"""A database or a broker that is stopped, not dead: it takes connections and says nothing. What needs neither goes on at once,
and what does is answered in words within seconds."""

from __future__ import annotations

import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from app.ops.embedded.postgres import DATABASE, Postgres
from app.ops.embedded.valkey import Valkey
from app.web import templates as web_pages
from tests.conftest import wait_until
from tests.security.test_door import web_process


class Servers:
    """A PostgreSQL and a Valkey of this test's own."""

    def __init__(self, folder: Path) -> None:
        self.postgres, self.valkey = Postgres(folder, fast=True), Valkey(folder)
        self.postgres.prepare()
        with (folder / "servers.log").open("ab") as log:
            self.processes = {
                name: subprocess.Popen(server.command(), stdout=log, stderr=log, cwd="/")
                for name, server in (("postgres", self.postgres), ("valkey", self.valkey))
            }

    @contextmanager
    def silent(self, name: str) -> Iterator[None]:
        """Every process of a server stopped, and going on at the end whatever happens."""
        main = psutil.Process(self.processes[name].pid)
        stopped = [main]
        try:
            main.suspend()  # first, so that it starts no other
            stopped += main.children(recursive=True)
            for process in stopped[1:]:
                process.suspend()
            yield
        finally:
            for process in reversed(stopped):
                process.resume()

    def stop(self) -> None:
        self.processes["postgres"].send_signal(signal.SIGINT)
        self.processes["valkey"].terminate()
        for process in self.processes.values():
            process.wait(20)


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[Servers, str, str]]:
    """The servers, the address of a web process on them, and an API key."""
    from app.migrate import upgrade
    from app.ops.embedded.up import is_open

    with tempfile.TemporaryDirectory(prefix="luthier-") as name:
        folder = Path(name)
        folder.chmod(0o711)
        servers = Servers(folder)
        try:
            wait_until(lambda: is_open(servers.postgres), what="PostgreSQL", log=folder / "servers.log")
            upgrade(servers.postgres.url_of(DATABASE))
            environment = {
                "LUTHIER_DATA_DIR": str(folder),
                "LUTHIER_DATABASE_URL": servers.postgres.url,
                "LUTHIER_REDIS_URL": servers.valkey.url,
                "LUTHIER_OFFLINE": "true",
            }
            with web_process(folder, **environment) as (port, _):
                yield servers, f"http://127.0.0.1:{port}"
        finally:
            servers.stop()


def seconds_of(url: str, status: int, **headers: str) -> float:
    begun = time.monotonic()
    answer = httpx.get(url, headers=headers, timeout=60)
    assert answer.status_code == status, answer.text[:300]
    return time.monotonic() - begun


ASKER = {"authorization": f"Bearer sk-luthier-{'0' * 32}-x"}
"""A key of the right shape, for which the database must be asked."""


@pytest.mark.long
@pytest.mark.parametrize("name", ["postgres", "valkey"])
def test_a_silent_server_freezes_nothing_that_does_not_need_it(running, name):
    servers, url = running
    assert seconds_of(f"{url}/v1/models", 401, **ASKER) < 10
    statuses: list[int] = []

    def ask(path: str) -> None:
        statuses.append(httpx.get(f"{url}{path}", headers=ASKER, timeout=60).status_code)

    with servers.silent(name):
        path = "/v1/models" if name == "postgres" else "/metrics"
        threads = [threading.Thread(target=ask, args=(path,), daemon=True) for _ in range(60)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        assert seconds_of(f"{url}/healthz", 200) < 2
        assert seconds_of(f"{url}{web_pages.static('luthier.css')}", 200) < 2
        assert seconds_of(f"{url}/readyz", 503) < 5
        begun = time.monotonic()
        for thread in threads:
            thread.join(60)
        assert time.monotonic() - begun < 40
    assert statuses == [503 if name == "postgres" else 200] * 60
    wait_until(lambda: httpx.get(f"{url}/readyz", timeout=20).status_code == 200, what="the web process", seconds=30)
    assert seconds_of(f"{url}/v1/models", 401, **ASKER) < 10
