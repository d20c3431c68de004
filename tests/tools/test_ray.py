"""Jobs on a real Ray: a head and nodes that come and go, with data folders of their own and an object storage between them.

`make test-tools` installs Ray into an environment of its own, which sees the studio's packages. RAY_JOBS is how many jobs are trained.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from app.db import transaction
from app.jobs import service as jobs
from app.settings import PROJECT, get_settings
from app.storage import places
from app.tables import Job
from tests.conftest import forget_settings, free_port, wait_until
from tests.factories import make_dataset, make_job
from tests.worker.supervision.test_train_attempt import RUN, now_of, said

PYTHON = PROJECT / ".tools" / "ray" / "bin" / "python"
JOBS = int(os.environ.get("RAY_JOBS", "3"))
QUICK = RUN | {"samples": 0, "forgetting": False, "row_losses": False}
pytestmark = [pytest.mark.tools, pytest.mark.timeout(1500)]


class Cluster:
    """Ray's head, which runs no job itself, and nodes, all on this machine. A node is known by a mark in its environment, which all that
    it starts has too."""

    def __init__(self, folder: Path, storage: str) -> None:
        self.folder, self.storage = folder, storage
        self.temporary = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # the path of a socket has at most 107 bytes
        self.port, self.dashboard = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.dashboard}"
        self.start(
            "head", "--head", f"--port={self.port}", "--num-cpus=0", "--include-dashboard=true", f"--dashboard-port={self.dashboard}",
            "--dashboard-host=127.0.0.1", f"--temp-dir={self.temporary}",
        )  # fmt: skip
        wait_until(self.answers, what="Ray's dashboard", seconds=120, log=folder / "head.log")
        (self.address,) = set(re.findall(r"Local node IP.*?(\d+\.\d+\.\d+\.\d+)", (folder / "head.log").read_text()))

    def answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/api/jobs/", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def start(self, name: str, *options: str) -> None:
        (self.folder / name).mkdir()
        environment = os.environ | {
            "LUTHIER_DATA_DIR": str(self.folder / name), "LUTHIER_STORAGE_URL": self.storage, "TEST_NODE": f"{self.folder}/{name}",
            "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(PROJECT),
        }  # fmt: skip
        log = self.folder / f"{name}.log"
        with log.open("ab") as out:
            command = [
                str(PYTHON.with_name("ray")),
                "start",
                *options,
                "--disable-usage-stats",
                "--block",
                "--object-store-memory=100000000",
            ]
            subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=out, stderr=out, start_new_session=True)
        wait_until(lambda: "Ray runtime started" in log.read_text(), what=f"the node {name}", seconds=120, log=log)

    def add(self, name: str, cpus: int = 1) -> None:
        self.start(name, f"--address={self.address}:{self.port}", f"--num-cpus={cpus}")

    def of(self, name: str) -> list[psutil.Process]:
        """Everything that a node has started: what has its mark, and the trainers, which have none of its environment."""
        found, mark = set(), f"TEST_NODE={self.folder}/{name}\0".encode()
        for process in psutil.process_iter():
            try:
                if mark in Path(f"/proc/{process.pid}/environ").read_bytes() + b"\0":
                    found |= {process, *process.children(recursive=True)}
            except (OSError, psutil.NoSuchProcess):
                continue
        return list(found)

    def trains(self, name: str) -> int:
        """How many training processes run on a node."""
        lines = [_command(process) for process in self.of(name)]
        return sum("worker.run --spec" in line and "torch.distributed.run" not in line for line in lines)

    def kill(self, name: str) -> None:
        """As the machine would lose its power: nothing of it says a word."""
        for _ in range(3):
            for process in self.of(name):
                try:
                    os.kill(process.pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue

    def stop(self) -> None:
        for name in [path.name for path in self.folder.iterdir() if path.is_dir()]:
            self.kill(name)
        shutil.rmtree(self.temporary, ignore_errors=True)


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.fixture
def cluster(session, data_dir, tmp_path, monkeypatch) -> Iterator[Cluster]:
    if not PYTHON.exists():
        pytest.skip("Ray is not installed: make test-tools")
    storage = f"file://{tmp_path / 'store'}"
    for name, value in {
        "STORAGE_URL": storage, "LEASE_SECONDS": "6", "BEAT_SECONDS": "1", "REAP_SECONDS": "1", "ANNOUNCE_AGAIN_SECONDS": "2", "STOP_GRACE_SECONDS": "20",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"LUTHIER_{name}", value)
    forget_settings()
    (folder := tmp_path / "nodes").mkdir()
    running = Cluster(folder, storage)
    yield running
    running.stop()


@pytest.fixture
def dispatcher(cluster, tmp_path) -> Iterator[Callable[..., None]]:
    """Start a worker that hands jobs over to the cluster; the relay runs beside it."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*command: str, **more: str) -> None:
        environment = os.environ | {f"LUTHIER_{name}": value for name, value in more.items()}
        with (tmp_path / "processes.log").open("ab") as log:
            started.append(subprocess.Popen([sys.executable, *command], cwd=PROJECT, env=environment, stdout=log, stderr=log))

    def dispatch(**more: str) -> None:
        for process in started[1:]:
            process.terminate()
            process.wait(30)
        del started[1:]
        ray = {"LAUNCHER": "ray", "LAUNCHER_URL": cluster.url, "LAUNCHER_PYTHON": str(PYTHON)}
        start("-m", "celery", "-A", "worker.main", "worker", "-Q", "train", "--pool=prefork", "-c", "1", "--without-gossip", **(ray | more))

    start("-m", "app.relay")
    dispatch()
    yield dispatch
    for process in started:
        process.terminate()
    for process in started:
        process.wait(30)
    print((tmp_path / "processes.log").read_text(errors="replace")[-4000:])


@pytest.fixture
def new_job(cluster, session, user, data_dir, tiny_registered):
    dataset = make_dataset(session, user, data_dir)
    for path in (tiny_registered.path, dataset.rows_path):
        places.push(path)
    return lambda **run: make_job(session, user, tiny_registered, dataset, **(QUICK | run))


def in_ray(cluster: Cluster) -> dict[str, str]:
    return {one["submission_id"]: one["status"] for one in httpx.get(f"{cluster.url}/api/jobs/", timeout=20).json()}


def is_over(job: Job) -> bool:
    row = now_of(job)
    assert row.status not in ("failed", "cancelled"), row.error
    return row.status == "succeeded"


def test_jobs_train_on_nodes_that_come_and_go(cluster, dispatcher, new_job, user):
    cluster.add("one")
    cluster.add("two")
    began = time.monotonic()
    made = [new_job(epochs=2) for _ in range(JOBS)]
    wait_until(lambda: all(map(is_over, made)), what="the end of all", seconds=120 + 60 * JOBS)
    print(f"\n{JOBS} jobs on two nodes: {time.monotonic() - began:.0f} s")
    assert [now_of(job).attempt for job in made] == [1] * JOBS
    assert all(places.stored(f"runs/{job.id}", "a1/trainer.log") for job in made), "logs are lost with their node"

    lost = new_job(epochs=60)
    wait_until(lambda: said(lost, "saved"), what="a checkpoint", seconds=120)
    (node,) = [name for name in ("one", "two") if cluster.trains(name)]
    cluster.kill(node)
    killed = time.monotonic()
    wait_until(lambda: len(said(lost, "started")) == 2, what="the second attempt on the other node", seconds=180)
    print(f"a node was killed; the job went on elsewhere after {time.monotonic() - killed:.0f} s")
    assert said(lost, "started")[1].data["resumed_from"] > 0 and now_of(lost).deaths <= 1
    with transaction() as session:
        jobs.pause(session, user, lost.id)
    wait_until(lambda: now_of(lost).status == "paused", what="the pause", seconds=60)
    with transaction() as session:
        jobs.resume(session, user, lost.id)
    wait_until(lambda: len(said(lost, "started")) == 3, what="the third attempt", seconds=120)
    with transaction() as session:
        jobs.cancel(session, user, lost.id)
    wait_until(lambda: now_of(lost).status == "cancelled", what="its end", seconds=60)
    wait_until(lambda: "RUNNING" not in in_ray(cluster).values(), what="an empty cluster", seconds=60)


def test_two_processes_of_one_job_are_placed_together_and_go_on_after_a_stop(cluster, dispatcher, new_job):
    dispatcher(GPUS_PER_JOB="2")
    cluster.add("small", cpus=1)
    job = new_job(epochs=40)
    wait_until(lambda: "PENDING" in in_ray(cluster).values(), what="a job that waits for room", seconds=60)
    time.sleep(5)
    assert now_of(job).status == "queued", "half of it was placed"
    cluster.add("large", cpus=2)
    wait_until(lambda: said(job, "saved"), what="a checkpoint", seconds=180)
    assert cluster.trains("large") >= 2
    name = next(name for name, status in in_ray(cluster).items() if status == "RUNNING")
    httpx.post(f"{cluster.url}/api/jobs/{name}/stop", timeout=20)
    wait_until(lambda: now_of(job).attempt == 2 or now_of(job).status == "queued", what="that it saves and leaves", seconds=60)
    wait_until(lambda: is_over(job), what="the end", seconds=300)
    assert now_of(job).attempt == 2 and said(job, "started")[1].data["resumed_from"] > 0 and now_of(job).deaths == 0


def test_an_engine_that_is_away_is_waited_for(cluster, dispatcher, new_job):
    cluster.add("one")
    running = new_job(epochs=30)
    wait_until(lambda: len(said(running, "step")) > 3, what="some steps", seconds=120)
    dashboard = [one for one in cluster.of("head") if "dashboard" in _command(one)]
    assert dashboard
    for process in dashboard:
        process.suspend()
    waiting = new_job(epochs=1)
    try:
        steps = len(said(running, "step"))
        wait_until(lambda: len(said(running, "step")) > steps + 3, what="steps of what runs", seconds=60)
        assert now_of(waiting).status == "queued"
    finally:
        for process in dashboard:
            process.resume()
    wait_until(lambda: is_over(running) and is_over(waiting), what="the end of both", seconds=300)
    assert now_of(running).attempt == now_of(waiting).attempt == 1
    assert get_settings().storage_url


def test_a_job_on_two_nodes_begins_with_both_and_goes_on_when_one_is_lost(cluster, dispatcher, new_job, session):
    cluster.add("one")
    job = new_job(epochs=200)
    job.num_machines = 2
    session.commit()
    wait_until(lambda: sorted(in_ray(cluster).values()) == ["PENDING", "RUNNING"], what="one that waits for the other", seconds=120)
    time.sleep(8)
    assert now_of(job).status == "queued" and cluster.trains("one") == 0, "half of it began"
    cluster.add("two")
    wait_until(lambda: said(job, "saved"), what="a checkpoint", seconds=180)
    assert (cluster.trains("one"), cluster.trains("two")) == (1, 1)
    cluster.kill("two")
    wait_until(lambda: now_of(job).deaths == 1 or len(said(job, "lost")) == 1, what="the end of the attempt", seconds=120)
    killed = time.monotonic()
    cluster.add("three")
    wait_until(lambda: len(said(job, "started")) == 2, what="the second attempt on the nodes that are left", seconds=240)
    print(f"\na node of two was killed; the job went on with another after {time.monotonic() - killed:.0f} s")
    assert said(job, "started")[1].data["resumed_from"] > 0
    assert (cluster.trains("one"), cluster.trains("three")) == (1, 1)
