"""Reinforcement whose answers a real vLLM draws, on the CPU: with the adapter of each step, by log-probabilities that agree with the trainer's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from app.inference import external_servers
from app.jobs import service as jobs
from app.jobs.request import read_order
from app.kit import ids, manifest
from app.models import import_checks
from app.shapes import shape_of
from app.tables import Model
from tests.conftest import PROJECT, free_port, wait_until
from tests.factories import make_dataset
from tests.inference.test_external_servers import allow
from tests.worker.supervision.test_train_attempt import new_job, now_of, said  # noqa: F401
from worker.supervision import job_turn

VLLM = PROJECT / ".tools" / "vllm" / "bin" / "vllm"
REWARD = "def grade(sample, item):\n    text = sample['output_text']\n    return sum(c in 'aeiou' for c in text) / (1 + len(text))"
pytestmark = [pytest.mark.tools, pytest.mark.starter, pytest.mark.timeout(1200)]


@pytest.fixture
def base(session, data_dir: Path, starter_model: Path) -> Model:
    """The starter as a base of everyone, committed."""
    key = uuid.uuid4()
    folder = data_dir / "models" / str(key)
    folder.mkdir(parents=True)
    for file in starter_model.glob("[!.]*"):
        if file.name == manifest.NAME:
            continue
        os.link(file, folder / file.name)
    shape, source = shape_of(json.loads((folder / "config.json").read_text())).model_dump(), {"from": "folder", "path": str(starter_model)}
    made = manifest.write(folder, source=source, license="apache-2.0", kind="dialogue", shape=shape, rules=import_checks.RULES)
    model = Model(
        id=key, name="starter", title="Starter", kind="dialogue", path=folder.relative_to(data_dir).as_posix(), revision=made["revision"],
        source=source, license="apache-2.0", shape=shape, bytes=made["bytes"],
    )  # fmt: skip
    session.add(model)
    session.commit()
    return model


@pytest.fixture
def url(starter_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if not VLLM.exists():
        pytest.skip("vLLM is not installed (make test-tools)")
    port, log = free_port(), tmp_path / "vllm.log"
    command = [
        VLLM, "serve", starter_model, "--served-model-name", "base", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32",
        "--max-model-len", "1024", "--enforce-eager", "--enable-lora", "--max-lora-rank", "16", "--no-enable-chunked-prefill",
    ]  # fmt: skip
    env = {
        "PATH": f"{VLLM.parent}:{os.environ['PATH']}", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }  # fmt: skip
    with log.open("wb") as out:
        process = subprocess.Popen([str(part) for part in command], env=env, stdout=out, stderr=out, start_new_session=True)

    def answers() -> bool:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            return httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    wait_until(answers, what="vLLM", seconds=300, log=log)
    address = f"http://127.0.0.1:{port}/v1"
    allow(monkeypatch, address)
    yield address
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(60)


@pytest.mark.usefixtures("new_job")
def test_vllm_draws_what_is_learnt(session, user, data_dir, base, url) -> None:
    external_servers.register(base, url, "base")
    own = {
        "grader": {"type": "python", "name": "vowels", "source": REWARD},
        "group_size": 4,
        "prompts_per_step": 3,
        "answer_tokens": 16,
        "check_prompts": 3,
    }
    run = {
        "max_steps": 3, "evaluations_per_epoch": 0, "validation_fraction": 0.2, "graded_rows": 5, "max_tokens_per_step": 512, "samples": 0,
        "forgetting": False, "row_losses": False, "precision": "fp32", "learning_rate": 1e-3, "epochs": 5,
    }  # fmt: skip
    order = {
        "model": "starter",
        "dataset_id": ids.public(ids.DATASET, make_dataset(session, user, data_dir, 24).id),
        "task": "reinforcement",
    }
    order |= {"preference": own | {"sampler": "server"}, "run": run, "strategy": {"name": "lora"}}
    job = jobs.create(session, user, read_order(order))
    session.commit()
    job_turn.work(job.id)
    assert now_of(job).status == "succeeded", now_of(job).error
    steps = [e.data["metrics"] for e in said(job, "step")]
    print([(step["reward"], step["ratio_std"], step["answer_length"]) for step in steps])
    assert len(steps) == 3 and all(0 < step["ratio_std"] < 1e-3 for step in steps), steps
    assert [one["id"] for one in httpx.get(f"{url}/models").json()["data"]] == ["base"], "an adapter was left on the server"
