"""Models put away and loaded again by the rule the pages show, in a real generate worker."""

from __future__ import annotations

import re
import shutil
import uuid

import openai
import pytest
import torch

from app import queue
from app.inference import residency
from app.settings import get_settings
from tests.conftest import wait_until
from tests.generating import _workers, answering_dir, generate_worker, register_tiny  # noqa: F401
from worker.inference.model_pool import ModelPool

ASK = {"messages": [{"role": "user", "content": "What wood is the belly made of?"}], "max_tokens": 2}


def loaded() -> dict[str, residency.LoadedModelInfo]:
    return {ready.path: ready for one in residency.everyone() for ready in one.models}


@pytest.mark.long
def test_a_model_is_put_away_when_idle_and_while_training_needs_its_memory(
    openai_client,
    api,
    client,
    session,
    generate_worker,  # noqa: F811
    monkeypatch,
):
    """The worker's limit on idleness is four seconds (tests/generating.py), and so is that of an engine in this very process."""
    monkeypatch.setenv("LUTHIER_GENERATE_IDLE_SECONDS", "4")
    get_settings.cache_clear()
    wait_until(lambda: "models/tiny" not in loaded(), what="what other tests loaded put away", seconds=20)
    model = register_tiny(session)
    openai_client.chat.completions.create(model="tiny", **ASK)
    wait_until(lambda: "models/tiny" in loaded(), what="the word of the loaded model", seconds=10)
    said = api.get("/v1/models/loaded").json()
    (row,) = [row for worker in said["data"] for row in worker["models"] if row["model"] == "tiny"]
    assert row["bytes"] > 4 * 100_000 and row["idle_seconds"] < 4.5 and "unloaded after" in said["rule"]
    for page in ("/models", "/models/loaded"):
        text = client.get(page).text
        assert "Loaded models" in text and f"/models/model-{model.id.hex}" in text and "finishes it first" in text
    for page in ("/models", "/playground", "/models/loaded?chip=true"):
        assert re.search(r'href="/models#loaded-models"[^>]*>[1-9] loaded · \d', client.get(page).text)

    talk = openai_client.chat.completions.create(model="tiny", **ASK | {"max_tokens": 400}, logit_bias={"70": 100}, stream=True)
    next(chunk for chunk in talk if chunk.choices and chunk.choices[0].delta.content)
    job = uuid.uuid4()
    residency.ask_room(job, 2**50)  # as a supervisor does while its trainer runs
    reasons = [chunk.choices[0].finish_reason for chunk in talk if chunk.choices]
    assert reasons[-1] == "length" and len(reasons) > 300, "a model that was answering was put away"
    wait_until(lambda: "models/tiny" not in loaded(), what="the model making room", seconds=10)
    assert "training on this machine takes about" in client.get("/models/loaded").text
    with pytest.raises(openai.InternalServerError) as caught:
        openai_client.chat.completions.create(model="tiny", **ASK)
    assert caught.value.status_code == 503 and caught.value.code == "training_needs_memory"
    residency.give_room_back(job)
    wait_until(lambda: not any(one.training_bytes for one in residency.everyone()), what="the end of training", seconds=10)
    openai_client.chat.completions.create(model="tiny", **ASK)
    wait_until(lambda: "models/tiny" in loaded(), what="the model standing ready again", seconds=10)
    wait_until(lambda: "models/tiny" not in loaded(), what="an idle model put away", seconds=10)


def test_another_persons_model_is_not_named(session, user):
    from app.tables import User

    other = User(name="somebody else")
    session.add(other)
    session.flush()
    register_tiny(session, "secret", owner_id=other.id)
    standing = residency.WorkerResidency(
        device="cpu", used_bytes=1, limit_bytes=2, training_bytes=0, models=[residency.LoadedModelInfo(path="models/tiny", bytes=1)]
    )
    assert residency.to_json(session, user, standing)["models"][0]["model"] is None
    assert residency.to_json(session, other, standing)["models"][0]["model"] == "secret"


def test_of_several_workers_each_is_named_with_its_device(client, session):
    register_tiny(session)
    for number, device in enumerate(("cpu", "cuda")):
        residency.say(
            f"several-{number}", residency.WorkerResidency(device=device, used_bytes=0, limit_bytes=10**9, training_bytes=0, models=[])
        )
    try:
        for page in ("/models", "/models/loaded"):
            text = client.get(page).text
            assert ", on cpu</h3>" in text and ", on cuda</h3>" in text
    finally:
        queue.get_redis().delete(*(f"{queue.PREFIX}loaded:several-{number}" for number in range(2)))


def test_room_is_counted_on_the_device_it_is_taken_from(session, monkeypatch):
    residency.ask_room(uuid.uuid4(), 100)
    residency.ask_room(uuid.uuid4(), 20)
    assert residency.room_asked(cuda=False) == 120 and residency.room_asked(cuda=True) == 0
    monkeypatch.setattr(residency, "this_machine", lambda: type("", (), {"cuda": True}))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    residency.ask_room(uuid.uuid4(), 7)
    assert residency.room_asked(cuda=True) == 7
    for mine in ("0", None):  # a process that may use all uses the first
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mine) if mine else monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        assert residency.room_asked(cuda=True) == 0 and residency.room_asked(cuda=False) == 120
    residency.ask_room(uuid.uuid4(), 5)
    assert residency.room_asked(cuda=True) == 5
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-aaaa")  # which of the numbers it has is not known
    assert residency.room_asked(cuda=True) == 12
    residency.ask_room(uuid.uuid4(), 3, "cpu")  # a job that leaves the card to others
    assert residency.room_asked(cuda=False) == 123


def test_a_job_on_several_cards_is_counted_on_each_of_them(session, monkeypatch):
    monkeypatch.setattr(residency, "this_machine", lambda: type("", (), {"cuda": True}))
    monkeypatch.setattr(residency, "get_settings", lambda: type("", (), {"gpus_per_job": 2}))
    for visible, bytes_ in ((None, 3), ("2,3", 40)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible) if visible else monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        residency.ask_room(uuid.uuid4(), bytes_)
    seen = {}
    for mine in "01234":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mine)
        seen[mine] = residency.room_asked(cuda=True)
    assert seen == {"0": 3, "1": 3, "2": 40, "3": 40, "4": 0}


def test_what_the_playground_may_take_follows_what_is_free_on_the_card(data_dir, monkeypatch):
    """It was fixed by what was free when the first question came: 8 GB for good where that was beside a job of 70 GB."""
    free, gib = [10], 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0] * gib, 80 * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 4 * gib)
    shelf = ModelPool(device="cuda")
    assert shelf.limit() == 14 * gib
    free[0] = 76
    assert shelf.limit() == shelf.memory_bytes == 64 * gib
    shelf.training_bytes = 70 * gib
    assert shelf.limit() == 6 * gib
    shelf.training_bytes = 120 * gib
    assert shelf.limit() == 0


def test_a_base_stays_while_trees_on_its_tensors_stand(data_dir, tiny_model, tmp_path):
    """Its memory would not come free, and nobody would count it."""
    from tests.worker.inference.test_engine import make_adapter, ref_of

    shutil.copytree(tiny_model, data_dir / "models" / "tiny")
    dora = make_adapter(tmp_path / "dora", tiny_model, 4, use_dora=True)
    (tmp_path / "dora" / "strategy.json").write_text('{"name": "lora", "rank": 4}')
    shelf = ModelPool(device="cpu")
    base, tuned = shelf.place(ref_of(data_dir)).lane, shelf.place(ref_of(data_dir, adapters=[dora])).lane
    (ready,) = shelf.ready()
    assert ready.answering == 2 and ready.adapters == [str(tmp_path / "dora")] and ready.bytes == shelf.memory()
    shelf.release(base)
    assert shelf.evict(before=float("inf")) == 0 and len(shelf.lanes) == 2
    shelf.release(tuned)
    shelf.training_bytes = 2**60
    assert shelf.fit(0) == 2 and not shelf.lanes and shelf.memory() == 0
