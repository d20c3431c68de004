"""What tests of generation share: a real generate worker on the small model, and a live web server."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from tests.conftest import PROJECT
from tests.tiny import AGENT_TEMPLATE

LONG = 16384
"""Tokens that `models/long` has room for: half a minute of its work, or more."""


def start_worker(data_dir: Path, redis_url: str, **more: str) -> subprocess.Popen:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("LUTHIER_")}
    env = (
        kept
        | {
            "LUTHIER_DATA_DIR": str(data_dir),
            "LUTHIER_REDIS_URL": redis_url,
            "LUTHIER_OFFLINE": "true",
            "OMP_NUM_THREADS": "1",
            "LUTHIER_GENERATE_IDLE_SECONDS": "4",
        }
        | more
    )
    command = [sys.executable, "-m", "celery", "-A", "worker.main", "worker", "-Q", "generate", "--pool=threads", "-c", "16", "-l", "INFO"]
    log = (data_dir / f"worker-{uuid.uuid4().hex[:6]}.log").open("wb")
    return subprocess.Popen(command, cwd=PROJECT, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)


def stop_worker(process: subprocess.Popen, kill: bool = False) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL if kill else signal.SIGTERM)
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(5)


# A fixture that a module imports is that module's own, even one of the session. Several workers on one queue would take each
# other's requests, so what they share stands here.
_folder: list[Path] = []
_running: list[subprocess.Popen] = []


@pytest.fixture(scope="session")
def answering_dir(tmp_path_factory, tiny_model: Path) -> Path:
    """The data folder of the generate worker. `models/tiny` is in it, and `models/long`: the same weights, with room to go on for so
    long that whoever leaves does so before the end, on a fast machine too. `models/agent` is the latter with a chat template that knows
    tools and thinking."""
    if not _folder:
        _folder.append(tmp_path_factory.mktemp("answering"))
        for name, room in (("tiny", 512), ("long", LONG), ("agent", LONG)):
            folder = shutil.copytree(tiny_model, _folder[0] / "models" / name)
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": room}))
        (folder / "chat_template.jinja").write_text(AGENT_TEMPLATE)
    return _folder[0]


@pytest.fixture(scope="session")
def _workers():
    yield _running
    for process in _running:
        stop_worker(process)


@pytest.fixture
def generate_worker(answering_dir: Path, valkey, _workers):
    """One worker for all tests; a new one when a test has killed it. It knows no database, so each test may have its own."""
    if not _workers or _workers[-1].poll() is not None:
        _workers.append(start_worker(answering_dir, valkey.url))
    return _workers[-1]


def register_long(session, name: str, kind: str = "dialogue"):
    """A row for the small model with much room."""
    return register_tiny(session, name, kind, path="models/long", room=LONG)


def register_agent(session, name: str = "agent"):
    """A row for the small model whose chat template knows tools and thinking."""
    return register_tiny(session, name, path="models/agent", room=LONG)


def register_tiny(session, name: str = "tiny", kind: str = "dialogue", path: str = "models/tiny", room: int = 512, **more):
    """A row for the worker's small model."""
    from app.shapes import shape_of
    from app.tables import Model

    config = {
        "model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": room, "tie_word_embeddings": True,
    }  # fmt: skip
    model = Model(
        id=uuid.uuid4(), name=name, title=name, kind=kind, path=path, revision="0" * 64, source={"kind": "folder"},
        shape=json.loads(shape_of(config).model_dump_json()), bytes=1, **more,
    )  # fmt: skip
    session.add(model)
    session.commit()
    return model


def leave_while_it_speaks(url: str, path: str, body: bytes, headers: dict[str, str]) -> None:
    """Send a request and close its connection once a worker has said something in reply to it, and before it has ended."""
    from app.queue import PREFIX, get_redis

    wire, before = get_redis(), set(get_redis().keys(f"{PREFIX}answer:*"))
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    connection.request("POST", path, body, headers)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        streams = [key for key in set(wire.keys(f"{PREFIX}answer:*")) - before if key.count(b":") == 2]
        if any(wire.xlen(key) >= 3 for key in streams):
            return connection.close()
        time.sleep(0.002)
    raise AssertionError("nobody answered")


def stopped_after(folder: Path, answer_id: uuid.UUID) -> int:
    """Tokens after which the engine let go of an answer, as the worker's log has it."""
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        logs = "".join(path.read_text(errors="replace") for path in folder.glob("worker-*.log"))
        if found := re.search(rf"Answer {answer_id} stopped after (\d+) of \d+ tokens: nobody reads it", logs):
            return int(found[1])
        time.sleep(0.05)
    raise AssertionError("the engine went on")


def stored_answers(session, count: int = 1) -> list:
    """The rows of `count` answers, which are stored a moment after their reader has left."""
    from sqlalchemy import select

    from app.tables import Answer

    deadline = time.monotonic() + 15
    while len(rows := session.scalars(select(Answer)).all()) < count and time.monotonic() < deadline:
        session.rollback()
        time.sleep(0.05)
    assert len(rows) == count
    return list(rows)
