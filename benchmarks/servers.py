"""A PostgreSQL, a Valkey and a data folder of a benchmark's own, with rows to begin with; or a whole studio."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import psutil

PROJECT = Path(__file__).resolve().parent.parent
STARTER = "smollm2-135m-instruct"


class Servers:
    """Both servers, each of which can be killed and started again."""

    def __init__(self, folder: Path, fast: bool = True) -> None:
        from app.ops.embedded.postgres import Postgres
        from app.ops.embedded.valkey import Valkey

        self.folder = folder
        self.postgres, self.valkey = Postgres(folder, fast=fast), Valkey(folder)
        self.processes: dict[str, subprocess.Popen] = {}
        self.log = (folder / "servers.log").open("wb")
        self.postgres.prepare()
        self.start("postgres")
        self.start("valkey")

    def start(self, name: str) -> None:
        command = {"postgres": self.postgres, "valkey": self.valkey}[name].command()
        self.processes[name] = subprocess.Popen(command, stdout=self.log, stderr=self.log, cwd="/", start_new_session=True)

    def kill(self, name: str) -> None:
        """`kill -9` of the server's main process; PostgreSQL's other processes see it and leave."""
        self.processes[name].kill()
        self.processes[name].wait()

    def stop(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.terminate() if process is not self.processes["postgres"] else process.send_signal(2)
        for process in self.processes.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)


@contextmanager
def servers(fast: bool = True, **settings: str) -> Iterator[Servers]:
    """Both servers with a migrated database, and this process's settings pointed at them."""
    folder = Path(tempfile.mkdtemp(prefix="luthier-bench-"))
    folder.chmod(0o711)
    running = Servers(folder, fast)
    os.environ.update(
        LUTHIER_DATA_DIR=str(folder / "data"),
        LUTHIER_DATABASE_URL=running.postgres.url,
        LUTHIER_REDIS_URL=running.valkey.url,
        LUTHIER_OFFLINE="true",
        HF_HUB_OFFLINE="1",
        OMP_NUM_THREADS="1",
        **settings,
    )
    (folder / "data").mkdir()
    from app.settings import get_settings

    get_settings.cache_clear()
    try:
        wait_for_database(running.postgres.url_of("postgres"))
        _make_database(running.postgres)
        yield running
    finally:
        running.stop()
        shutil.rmtree(folder, ignore_errors=True)


def wait_for_database(url: str, seconds: float = 30) -> None:
    import psycopg

    deadline = time.monotonic() + seconds
    while True:
        try:
            psycopg.connect(url.replace("+psycopg", ""), connect_timeout=3).close()
            return
        except psycopg.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _make_database(postgres: Any) -> None:
    import psycopg

    from app.migrate import upgrade

    name = postgres.url.rsplit("/", 1)[-1].partition("?")[0]
    with psycopg.connect(postgres.url_of("postgres").replace("+psycopg", ""), autocommit=True) as admin:
        if not admin.execute("SELECT 1 FROM pg_database WHERE datname = %s", (name,)).fetchone():
            admin.execute(f'CREATE DATABASE "{name}"')
    upgrade(postgres.url)


def python(*arguments: str, log: Path, **environment: str) -> subprocess.Popen:
    with log.open("ab") as out:
        return subprocess.Popen([sys.executable, *arguments], cwd=PROJECT, env=os.environ | environment, stdout=out, stderr=out)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def tiny_model(data_dir: Path, session: Any) -> Any:
    """The small Llama of the tests, as a registered base."""
    from app.kit import manifest
    from app.shapes import shape_of
    from app.tables import Model
    from tests.tiny import build_model

    key = uuid.uuid4()
    folder = build_model(data_dir / "models" / str(key))
    files = manifest.write(folder)
    model = Model(
        id=key,
        name="tiny",
        title="Tiny",
        kind="dialogue",
        path=folder.relative_to(data_dir).as_posix(),
        revision=files["revision"],
        shape=shape_of(json.loads((folder / "config.json").read_text())).model_dump(),
        bytes=files["bytes"],
    )
    session.add(model)
    session.commit()
    return model


class Studio(NamedTuple):
    """A running studio: its address, an API key, a link that signs a browser in once, and its data folder."""

    url: str
    key: str
    link: str
    folder: Path


@contextmanager
def studio(model: Path, name: str = STARTER, others: Mapping[str, Path] = MappingProxyType({})) -> Iterator[Studio]:
    """`luthier up` in a folder of its own with the starter model `name` in it, copied from the folder `model`, and `others` by their names."""
    from app.models import starters

    folder = Path(tempfile.mkdtemp(prefix="luthier-studio-"))
    folder.chmod(0o711)
    for starter, place in {name: model, **others}.items():
        shutil.copytree(place.resolve(), folder / "models" / str(starters.model_id(starter)))
    port, log = free_port(), folder / "up.log"
    env = {k: v for k, v in os.environ.items() if not k.startswith("LUTHIER_")}
    env |= {"LUTHIER_DATA_DIR": str(folder), "LUTHIER_OFFLINE": "true", "PYTHONUNBUFFERED": "1"}

    def luthier(*arguments: str) -> str:
        command = [sys.executable, "-m", "app.cli", *arguments]
        return subprocess.run(command, cwd=PROJECT, env=env, capture_output=True, text=True, check=True).stdout.strip()

    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "app.cli", "up", "--port", str(port)],
            cwd=PROJECT,
            env=env,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 120
        while not re.search(rf"http://127\.0\.0\.1:{port}/\S+", log.read_text(errors="replace")):
            if time.monotonic() > deadline or process.poll() is not None:
                raise SystemExit(log.read_text(errors="replace")[-4000:])
            time.sleep(0.2)
        yield Studio(f"http://127.0.0.1:{port}", luthier("keys", "create", "benchmark"), luthier("link"), folder)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(90)
        shutil.rmtree(folder, ignore_errors=True)


def starters_in(folder: Path) -> dict[str, Path]:
    """The starters whose files are in the folder `models` of a studio, by name."""
    from app.models import starters

    places = {name: folder / str(starters.model_id(name)) for name in starters.STARTERS}
    return {name: place for name, place in places.items() if (place / "config.json").is_file()}


def trainers(folder: str) -> list[psutil.Process]:
    """The trainers that run for the studio in this folder."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or [])
        if "worker.run" in line and folder in line and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def trained_alone(order: dict[str, Any], code: str) -> Any:
    """What `code` says last, as JSON, in a process of its own with a data folder of its own, given the path of a file with the order."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.yaml"
        path.write_text(json.dumps(order))  # JSON is YAML
        command, environment = [sys.executable, "-c", code, str(path)], {**os.environ, "LUTHIER_DATA_DIR": folder}
        done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])
