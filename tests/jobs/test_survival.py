"""Kill everything, one after the other, while a job runs: it finishes, and its weights are those of an undisturbed run."""

from __future__ import annotations

import contextlib
import shutil
import signal
import tempfile
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.conftest import PROJECT, start_studio, wait_until

SAMPLE = PROJECT / "samples" / "support-replies.jsonl"
ORDER = {
    "model": "tiny",
    "seed": 3,
    "strategy": {"name": "lora", "rank": 4, "dropout": 0.1},
    "run": {
        "epochs": 16,
        "max_tokens_per_step": 256,
        "micro_batches": 2,
        "evaluations_per_epoch": 0.5,
        "samples": 0,
        "forgetting": False,
        "early_stopping_patience": 0,
    },
}
pytestmark = [pytest.mark.studio, pytest.mark.timeout(900)]


class Client:
    """The API of a studio, patient while a part of it is being restarted."""

    def __init__(self, url: str, key: str) -> None:
        self.key = key
        self.http = httpx.Client(base_url=f"{url}/v1", headers={"authorization": f"Bearer {key}"}, timeout=20)

    def ask(self, method: str, path: str, **rest) -> dict:
        deadline = time.monotonic() + 60
        while True:
            try:
                answer = self.http.request(method, path, **rest)
            except httpx.HTTPError:
                answer = None
            if answer is not None and answer.status_code < 500:
                assert answer.status_code == 200, answer.text
                return answer.json()
            assert time.monotonic() < deadline, f"{method} {path} never answered: {answer and answer.text}"
            time.sleep(0.3)

    def submit(self, file: str, name: str) -> str:
        return self.ask("POST", "/fine_tuning/jobs", json={**ORDER, "training_file": file, "suffix": name})["id"]

    def follow(self, job: str, until) -> dict:
        deadline = time.monotonic() + 300
        while True:
            told = self.ask("GET", f"/fine_tuning/jobs/{job}")
            if until(told):
                return told
            assert told["status"] not in ("failed", "cancelled"), told["error"]
            assert time.monotonic() < deadline, told
            time.sleep(0.1)


def processes(studio, *words: str) -> list[psutil.Process]:
    """The studio's processes whose command line holds all the words."""
    found = []
    for process in psutil.Process(studio.process.pid).children(recursive=True):
        try:
            line = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if all(word in line for word in words):
            found.append(process)
    return found


VICTIMS = {
    "trainer": ("worker.run",),
    "worker": ("celery", "train"),
    "valkey": ("valkey-server",),
    "postgres": ("postgres", "-D"),
}
ENDS_AN_ATTEMPT = ("trainer", "worker")
"""The others are servers: the trainer goes on without them, and the attempt is the same afterwards."""
QUICK = {"LUTHIER_LEASE_SECONDS": "4", "LUTHIER_BEAT_SECONDS": "1", "LUTHIER_REAP_SECONDS": "1"}


@pytest.mark.fault
def test_a_job_survives_the_death_of_every_part(tiny_model: Path):
    """Its trainer, its worker, both servers, Ctrl-C and the death of the supervisor itself, each in the middle of its steps."""
    folder = Path(tempfile.mkdtemp(prefix="luthier-survival-"))
    folder.chmod(0o711)
    studio = start_studio(folder, **QUICK)
    try:
        added = studio.luthier("models", "add", "tiny", "--path", str(tiny_model))
        assert added.returncode == 0, added.stderr + added.stdout
        client = Client(studio.url, studio.luthier("keys", "create", "survival").stdout.strip())
        with SAMPLE.open("rb") as file:
            uploaded = client.ask("POST", "/files", data={"purpose": "fine-tune"}, files={"file": file})["id"]

        calm = client.follow(client.submit(uploaded, "calm"), lambda told: told["status"] == "succeeded")

        job = client.submit(uploaded, "killed")
        blows = iter(range(1, 9))

        def now_running() -> dict:
            """The job in the middle of its steps, an eighth of them further than at the blow before."""
            at = max(2, next(blows) * calm["measured"]["steps"] // 8)
            return client.follow(job, lambda told: told["status"] == "running" and told["progress"]["step"] >= at)

        for name, words in VICTIMS.items():
            before = now_running()["progress"]
            victims = processes(studio, *words)
            assert victims, f"no process of {name}"
            for victim in victims:
                victim.kill()
            attempt, step = before["attempt"] + (name in ENDS_AN_ATTEMPT), 0 if name in ENDS_AN_ATTEMPT else before["step"]
            after = client.follow(job, lambda told, a=attempt, s=step: told["progress"]["attempt"] >= a and told["progress"]["step"] > s)
            assert (after["status"], after["progress"]["attempt"]) == ("running", attempt), f"after the death of {name}: {after}"

        for ending in (signal.SIGINT, signal.SIGKILL):
            before = now_running()["progress"]
            assert any("worker.run" in line for line in living(folder)), "the trainer is not seen"
            studio.process.send_signal(ending)
            code = studio.process.wait(60)
            assert code == (0 if ending == signal.SIGINT else -ending), studio.log.read_text()[-3000:]
            wait_until(lambda: not living(folder), what="the end of every process", seconds=15)
            # No lease need pass: whoever starts here knows that nobody is left. One that had to would take longer than is waited.
            studio = start_studio(folder, **QUICK | {"LUTHIER_LEASE_SECONDS": "600"})
            client = Client(studio.url, client.key)
            after = client.follow(job, lambda told, attempt=before["attempt"]: told["progress"]["attempt"] > attempt)
            assert after["progress"]["attempt"] == before["attempt"] + 1, after

        killed = client.follow(job, lambda told: told["status"] == "succeeded")
        assert killed["progress"]["attempt"] == 5, "the trainer, the worker, Ctrl-C and the supervisor each ended one of them"
        assert losses(client, killed["id"]) == losses(client, calm["id"])
        assert adapter(client, killed) == adapter(client, calm)
    finally:
        studio.stop()
        shutil.rmtree(folder, ignore_errors=True)


def living(folder: Path) -> list[str]:
    """Every process that works for a studio in this folder, by its command line: known by what it was told and where it works."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            told = [*process.environ().values(), *process.cmdline(), process.cwd()]
            if process.status() != psutil.STATUS_ZOMBIE and any(str(folder) in word for word in told):
                found.append(" ".join(process.cmdline()))
    return found


def losses(client: Client, job: str) -> dict[int, float]:
    """The last word on every step's training loss."""
    told: dict[int, float] = {}
    after = ""
    while True:
        page = client.ask("GET", f"/fine_tuning/jobs/{job}/events?limit=100{after}")
        for event in page["data"]:
            data = event["data"] or {}
            if "train_loss" in data:
                told.setdefault(data["step"], data["train_loss"])  # newest first
        if not page["has_more"]:
            return told
        after = f"&after={page['data'][-1]['id']}"


def adapter(client: Client, job: dict) -> str:
    model = client.ask("GET", f"/models/{job['fine_tuned_model']}")
    return model["adapter_sha256"]
