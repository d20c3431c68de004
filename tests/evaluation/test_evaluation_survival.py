"""Kill everything, one after the other, while an evaluation runs: it is claimed again and finds what an undisturbed one finds."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import pytest

from tests.conftest import start_studio
from tests.jobs.test_survival import SAMPLE, Client, processes

pytestmark = [pytest.mark.studio, pytest.mark.timeout(600)]

VICTIMS = {
    "child": ("worker.evaluation.process",),
    "workers": ("celery", "evaluate"),  # both kinds
    "valkey": ("valkey-server",),
    "postgres": ("postgres", "-D"),
}


def submit(client: Client, order: dict) -> str:
    """Ordered as soon as the file has been read; until then the studio says that it has not."""
    deadline = time.monotonic() + 60
    while (answer := client.http.post("/evaluations", json=order)).status_code == 409 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def follow(client: Client, key: str, until) -> dict:
    deadline = time.monotonic() + 300
    while not until(told := client.ask("GET", f"/evaluations/{key}")):
        assert told["status"] in ("queued", "running"), (told["status"], told["error"])
        assert time.monotonic() < deadline, told
        time.sleep(0.1)
    return told


@pytest.mark.fault
def test_an_evaluation_survives_the_death_of_every_part(tiny_model: Path):
    folder = Path(tempfile.mkdtemp(prefix="luthier-survival-"))
    folder.chmod(0o711)
    studio = start_studio(folder, LUTHIER_LEASE_SECONDS="4", LUTHIER_BEAT_SECONDS="1", LUTHIER_REAP_SECONDS="1")
    try:
        added = studio.luthier("models", "add", "tiny", "--path", str(tiny_model))
        assert added.returncode == 0, added.stderr + added.stdout
        client = Client(studio.url, studio.luthier("keys", "create", "survival").stdout.strip())
        with SAMPLE.open("rb") as file:
            uploaded = client.ask("POST", "/files", data={"purpose": "fine-tune"}, files={"file": file})["id"]
        order = {"model": "tiny", "file": uploaded, "answers": 4, "answer_tokens": 8}
        calm = follow(client, submit(client, order), lambda told: told["status"] == "succeeded")

        killed = submit(client, order)
        for name, words in VICTIMS.items():
            follow(client, killed, lambda told: told["status"] == "running" and processes(studio, "worker.evaluation.process"))
            victims = processes(studio, *words)
            assert victims, f"no process of {name}"
            for victim in victims:
                victim.kill()
            time.sleep(1.5)  # what was killed is noticed before the next blow
        told = follow(client, killed, lambda told: told["status"] == "succeeded")
        for name in ("rows", "scores", "worst", "best"):
            assert told["result"][name] == calm["result"][name], name
        assert not processes(studio, "worker.evaluation.process")
    finally:
        studio.stop()
