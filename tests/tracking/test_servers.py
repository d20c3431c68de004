"""Jobs in real trackers: a server of MLflow and one of Trackio, started here, and the package of Weights & Biases offline. They are in
folders of their own (`make test-trackers`); without them the tests are skipped."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import update

from app import leases, trackers
from app.db import transaction
from app.kit import ids
from app.tables import TrackedRun
from app.trackers import mlflow as mlflow_tracker
from app.tracking import sending
from app.tracking import service as tracking
from tests.conftest import PROJECT, free_port
from tests.lives import Life, order, started, steps
from tests.tracking.test_sending import row_of, send_all, settings, tracked

FOLDER = PROJECT / ".trackers"
MLFLOW, TRACKIO = FOLDER / "servers" / "bin" / "mlflow", FOLDER / "servers" / "bin" / "trackio"
pytestmark = [pytest.mark.long, pytest.mark.timeout(240)]


class Tracked:
    """A tracker's server that can be started, killed and started again."""

    def __init__(self, command: list[str], port: int, ready: str, folder: Path, **env: str) -> None:
        self.command, self.url, self.ready, self.folder = command, f"http://127.0.0.1:{port}", ready, folder
        self.env = {"PATH": os.environ["PATH"], "HOME": str(folder), **env}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Tracked:
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(self.command, cwd=self.folder, env=self.env, stdout=log, stderr=log, start_new_session=True)
        late = time.monotonic() + 120
        while time.monotonic() < late and self.process.poll() is None:
            try:
                if httpx.get(self.url + self.ready, timeout=2).status_code < 500:
                    return self
            except httpx.HTTPError:
                time.sleep(0.2)
        pytest.fail(f"{self.command[0]} did not start: {(self.folder / 'log').read_text()[-2000:]}")

    def stop(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(20)
            self.process = None


def is_due() -> None:
    with transaction() as session:
        session.execute(update(TrackedRun).values(next_at=leases.now()))


# MLflow -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, session) -> Iterator[Tracked]:
    if not MLFLOW.exists():
        pytest.skip("MLflow's server is not installed (make test-trackers)")
    port, folder = free_port(), tmp_path / "mlflow"
    folder.mkdir()
    command = [
        str(MLFLOW),
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
        "--backend-store-uri",
        "sqlite:///runs.db",
    ]
    server = Tracked(command, port, "/health", folder, MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")
    settings(monkeypatch, mlflow=server.url, public_url="https://luthier.example")
    yield server
    server.stop()


def call(server: Tracked, path: str, **body: Any) -> dict[str, Any]:
    answer = httpx.post(f"{server.url}/api/2.0/mlflow/{path}", json=body, timeout=20)
    assert answer.status_code == 200, answer.text
    return answer.json()


def runs_of(server: Tracked, experiment: str) -> list[dict[str, Any]]:
    found = httpx.get(f"{server.url}/api/2.0/mlflow/experiments/get-by-name", params={"experiment_name": experiment}, timeout=20).json()
    return call(server, "runs/search", experiment_ids=[found["experiment"]["experiment_id"]]).get("runs", [])


def history(server: Tracked, run: dict[str, Any], key: str) -> list[tuple[int, float]]:
    asked = {"run_id": run["info"]["run_id"], "metric_key": key, "max_results": 5000}
    found = httpx.get(f"{server.url}/api/2.0/mlflow/metrics/get-history", params=asked, timeout=20).json()
    return [(int(one["step"]), float(one["value"])) for one in found["metrics"]]


def test_mlflow_has_a_whole_run_after_it_was_away_twice_and_a_worker_died(session, user, tiny_registered, mlflow, monkeypatch):
    """Away when the job begins, there, killed in the middle of a sending, away, and there again at the end."""
    job = order(session, user, tiny_registered)
    wish = trackers.read([{"type": "mlflow", "mlflow": {"experiment": "violins", "tags": {"team": "strings"}}}])
    life = tracked(session, job, *wish).claim().say(started(), *steps(1, 20))
    send_all()
    assert "cannot be reached" in row_of(job.id).error
    mlflow.start()
    send_all()
    assert row_of(job.id).error is None and row_of(job.id).sent_steps["step"] == 19
    life.say(*steps(21, 44))
    die_while_sending(row_of(job.id), monkeypatch)
    mlflow.stop()
    life.lose().claim().say(started(resumed_from=36), *steps(37, 90))
    send_all()
    assert "cannot be reached" in row_of(job.id).error
    mlflow.start()
    life.say(*steps(91, 120)).finish()
    send_all()

    (run,) = runs_of(mlflow, "violins")
    assert run["info"]["status"] == "FINISHED" and run["info"]["run_name"] == "support-tone"
    assert [step for step, _ in history(mlflow, run, "train/loss")] == list(range(1, 121))
    assert [step for step, _ in history(mlflow, run, "validation/loss")] == list(range(12, 121, 12))
    assert dict(history(mlflow, run, "train/loss"))[120] == pytest.approx(next(e.loss for e in steps(120, 120)))
    assert history(mlflow, run, "final/tuned/token_accuracy") == [(120, 0.71)]
    parameters = {one["key"]: one["value"] for one in run["data"]["params"]}
    assert parameters["strategy.name"] == "lora" and parameters["model"] == "tiny" and float(parameters["run.learning_rate"]) > 0
    tags = {one["key"]: one["value"] for one in run["data"]["tags"]}
    assert tags["luthier_url"] == f"https://luthier.example/jobs/{ids.public(ids.JOB, job.id)}" and tags["team"] == "strings"
    assert row_of(job.id).state["url"].startswith(f"{mlflow.url}/#/experiments/")


def die_while_sending(row: TrackedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker is killed once the server has taken the figures; another one takes over."""
    post = mlflow_tracker._Server.post

    def posts_and_dies(self: Any, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = post(self, path, body)
        if path == "runs/log-batch":
            raise SystemExit
        return answer

    is_due()
    with monkeypatch.context() as patch:
        patch.setattr(mlflow_tracker._Server, "post", posts_and_dies)
        with pytest.raises(SystemExit):
            sending.send(row.id)
    with transaction() as session:
        session.execute(update(TrackedRun).values(lease_until=leases.OVER))
        assert leases.expire(session, tracking.WORK) == 1


def test_mlflow_finds_a_run_again_whose_creation_was_not_recorded_and_keeps_its_end(session, user, tiny_registered, mlflow, monkeypatch):
    mlflow.start()
    job = order(session, user, tiny_registered)
    life = tracked(session, job, trackers.TRACKERS["mlflow"]()).claim().say(started(), *steps(1, 5))
    die_while_sending(row_of(job.id), monkeypatch)
    assert row_of(job.id).state == {} and len(runs_of(mlflow, "luthier")) == 1
    life.say(events_nan())
    life.fail(diverged())
    send_all()
    (run,) = runs_of(mlflow, "luthier")
    assert run["info"]["status"] == "FAILED" and [step for step, _ in history(mlflow, run, "train/loss")] == list(range(1, 7))
    tags = {one["key"]: one["value"] for one in run["data"]["tags"]}
    assert tags["luthier_error"] == "The loss is not finite."


def events_nan() -> Any:
    (step,) = steps(6, 6, every=99)
    return step.model_copy(update={"loss": float("nan"), "grad_norm": float("inf")})


def diverged() -> Any:
    from app import events

    return events.Failed(kind="diverged", message="The loss is not finite.")


# Trackio ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, session) -> Iterator[Tracked]:
    if not TRACKIO.exists():
        pytest.skip("Trackio is not installed (make test-trackers)")
    port, folder = free_port(), tmp_path / "trackio"
    folder.mkdir()
    env = {"GRADIO_SERVER_PORT": str(port), "TRACKIO_DIR": str(folder / "data"), "TRACKIO_WRITE_TOKEN": "t0ken", "HF_HUB_OFFLINE": "1"}
    server = Tracked([str(TRACKIO), "show", "--host", "127.0.0.1"], port, "/", folder, **env)
    settings(monkeypatch, trackio=f"http://:t0ken@127.0.0.1:{port}")
    yield server
    server.stop()


def logged(server: Tracked, project: str) -> list[dict[str, Any]]:
    """What Trackio's own command line says of the one run of a project."""
    runs = told(server, "list", "runs", "--project", project)
    assert len(runs["runs"]) == 1, runs
    return runs["runs"]


def told(server: Tracked, *arguments: str) -> dict[str, Any]:
    done = subprocess.run([str(TRACKIO), *arguments, "--json"], env=server.env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_trackio_has_each_step_once_also_where_a_sending_is_repeated(session, user, tiny_registered, trackio, monkeypatch):
    job = order(session, user, tiny_registered)
    wish = trackers.read([{"type": "trackio", "trackio": {"project": "violins", "name": "first"}}])
    life = tracked(session, job, *wish).claim().say(started(), *steps(1, 30))
    send_all()
    assert "cannot be reached" in row_of(job.id).error and "t0ken" not in row_of(job.id).error
    trackio.start()
    send_all()
    with transaction() as opened:  # as if the worker had died before it recorded the sending
        opened.execute(update(TrackedRun).values(last_event_id=0, sent_steps={}))
    life.say(*steps(31, 120)).finish()
    send_all()
    assert row_of(job.id).error is None
    logged(trackio, "violins")
    found = told(trackio, "get", "metric", "--project", "violins", "--run", "first", "--metric", "train/loss")
    assert Counter(int(one["step"]) for one in found["values"]) == Counter(range(1, 121))
    final = told(trackio, "get", "metric", "--project", "violins", "--run", "first", "--metric", "final/tuned/loss")
    assert [one["value"] for one in final["values"]] == [1.13]
    settings(monkeypatch, trackio=trackio.url)
    Life(session, order(session, user, tiny_registered)).claim().say(started(), *steps(1, 3))


# Weights & Biases ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def wandb_offline(monkeypatch: pytest.MonkeyPatch, session) -> None:
    if importlib.util.find_spec("wandb") is None:
        pytest.skip("wandb is not installed (make test-trackers)")
    settings(monkeypatch, wandb="offline")


READ = """
import json, struct, sys
from wandb.proto import wandb_internal_pb2 as pb
data, at, whole, found = open(sys.argv[1], "rb").read(), 7, b"", []
while at + 7 <= len(data):  # records of LevelDB's log format, in blocks of 32 KiB
    if 32768 - at % 32768 < 7:
        at += 32768 - at % 32768
        continue
    _, length, kind = struct.unpack_from("<IHB", data, at)
    whole, at = whole + data[at + 7 : at + 7 + length], at + 7 + length
    if kind not in (1, 4):  # whole, or the last part
        continue
    record, whole = pb.Record.FromString(whole), b""
    kind = record.WhichOneof("record_type")
    if kind == "history":
        found.append({(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item})
    elif kind == "run":
        found.append({"run": record.run.run_id, "project": record.run.project, "name": record.run.display_name,
                      "config": {item.key: json.loads(item.value_json) for item in record.run.config.update}, "tags": list(record.run.tags)})
    elif kind == "summary":
        found.append({"summary": {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in record.summary.update}})
    elif kind == "exit":
        found.append({"exit": record.exit.exit_code})
print(json.dumps(found))
"""


def test_wandb_offline_writes_one_whole_run_at_the_end(session, user, tiny_registered, data_dir, wandb_offline, monkeypatch):
    job = order(session, user, tiny_registered)
    wish = trackers.read([{"type": "wandb", "wandb": {"project": "violins", "name": None, "entity": None, "tags": ["a"]}}])
    life = tracked(session, job, *wish).claim().say(started(), *steps(1, 44))
    send_all()
    assert row_of(job.id).state == {} and row_of(job.id).error is None
    life.lose().claim().say(started(resumed_from=36), *steps(37, 120)).finish()
    send_all()
    row = row_of(job.id)
    assert row.error is None, row.error
    (folder,) = row.state["folders"]
    (file,) = Path(folder).glob("*.wandb")
    done = subprocess.run([sys.executable, "-c", READ, str(file)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (run,) = [one for one in found if "run" in one]
    assert (run["run"], run["project"], run["name"], run["tags"]) == (job.id.hex, "violins", "support-tone", ["a"])
    assert run["config"]["strategy.name"] == "lora"
    rows = [one for one in found if "_step" in one]
    assert [row["_step"] for row in rows if "train/loss" in row] == list(range(1, 121))
    assert [row["_step"] for row in rows if "validation/loss" in row] == list(range(12, 121, 12))
    summary = {key: value for one in found for key, value in one.get("summary", {}).items()}
    assert summary["final/tuned/loss"] == 1.13 and summary["luthier/status"] == "succeeded"
    assert [one["exit"] for one in found if "exit" in one] == [0]
    assert not (data_dir / "runs" / str(job.id) / "wandb" / "draft").exists()


def test_wandb_that_refuses_is_tried_again_and_its_key_is_not_told(session, user, tiny_registered, wandb_offline, monkeypatch):
    settings(monkeypatch, wandb=f"http://:{'ab12' * 10}@127.0.0.1:{free_port()}")
    job = order(session, user, tiny_registered)
    tracked(session, job, trackers.TRACKERS["wandb"]()).claim().say(started(), *steps(1, 5))
    monkeypatch.setattr("app.trackers.wandb.SECONDS", 20.0)
    is_due()
    sending.send(row_of(job.id).id)
    row = row_of(job.id)
    assert row.error and row.tries == 1 and "ab12ab12" not in row.error
