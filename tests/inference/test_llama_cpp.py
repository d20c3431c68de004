"""llama.cpp answers for a model: who may choose it, for which models, and that the page, the API and the lab say so."""

from __future__ import annotations

import json
import shutil

import pytest

from app.errors import BadField
from app.inference import external_servers
from app.models import service as models
from app.settings import get_settings
from tests.generating import _workers, answering_dir, generate_worker, register_tiny  # noqa: F401
from tests.inference.test_external_servers import said


@pytest.fixture
def tiny(session):
    return register_tiny(session)


def choose(session, user, name="tiny", kind="F32"):
    external_servers.register(models.get(session, user, name), "llama.cpp", kind)
    session.commit()


@pytest.mark.long
def test_it_answers_as_the_built_in_engine_and_the_answer_says_so(openai_client, generate_worker, session, user, client, tiny):  # noqa: F811
    before = said(openai_client, "tiny", temperature=0)
    choose(session, user)
    raw = openai_client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Good morning!"}], temperature=0, max_tokens=12
    )
    assert raw.model_dump()["luthier"]["engine"] == "llama.cpp F32"
    assert said(openai_client, "tiny", temperature=0) == before
    order = {"models": ["tiny"], "prompt": "Good morning!", "sampling.max_tokens": "12", "sampling.temperature": "0"}
    told = [json.loads(line) for line in client.post("/playground/stream", data=order).text.splitlines()]
    assert "through llama.cpp F32" in next(one["proof"] for one in told if one["type"] == "done")
    penalty = openai_client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Good morning!"}], max_tokens=4, frequency_penalty=1.0
    )
    assert penalty.model_dump()["luthier"]["engine"] is None, "what it samples otherwise the built-in engine answers"


def test_its_adapters_are_answered_on_it(session, user, tiny, data_dir, tiny_model):
    from tests.worker.inference.test_engine import make_adapter

    laid = make_adapter(data_dir / "runs" / "one", tiny_model, 1)
    register_tiny(session, "tuned", path="runs/one", base_id=tiny.id, adapter=True, strategy="lora", adapter_sha256=laid.sha256)
    assert external_servers.engine_of(session, models.resolve(session, user, "tuned")) is None
    choose(session, user, kind="Q8_0")
    found = external_servers.engine_of(session, models.resolve(session, user, "tuned"))
    assert (found.local, found.model, found.adapter, found.host) == (True, "Q8_0", "runs/one", "llama.cpp Q8_0")
    with pytest.raises(BadField, match="is an adapter"):
        choose(session, user, "tuned")
    shutil.rmtree(data_dir / "runs" / "one")
    external_servers._plain_lora.cache_clear()
    assert external_servers.engine_of(session, models.resolve(session, user, "tuned")) is None, "it is not known to be plain LoRA"
    external_servers._plain_lora.cache_clear()


def test_what_cannot_be_run_is_refused(session, user, tiny):
    with pytest.raises(BadField, match="has no type 'Q99'"):
        choose(session, user, kind="Q99")
    tiny.shape = tiny.shape | {"model_type": "gpt_neox"}
    with pytest.raises(BadField, match="cannot run tiny"):
        choose(session, user)
    assert tiny.engine is None


def test_the_setting_chooses_for_every_model_that_names_nothing(session, user, tiny, monkeypatch):
    found = models.resolve(session, user, "tiny")
    assert external_servers.engine_of(session, found) is None
    monkeypatch.setattr(get_settings(), "cpu_engine", "llama.cpp")
    assert external_servers.engine_of(session, found).model == "F16"
    monkeypatch.setattr(get_settings(), "cpu_engine", "llama.cpp:BF16")
    assert external_servers.engine_of(session, found).model == "BF16"
    tiny.shape = tiny.shape | {"model_type": "gpt_neox"}
    assert external_servers.engine_of(session, models.resolve(session, user, "tiny")) is None


def test_the_page_and_the_api_choose_it_and_the_model_can_still_be_scored_and_exported(client, api, session, user, tiny):
    from app.models import export_facts

    page = client.get(f"/models/model-{tiny.id.hex}?tab=settings").text
    assert 'name="url" value="llama.cpp"' in page and "<option>Q8_0</option>" in page
    client.post(f"/models/model-{tiny.id.hex}/engine", data={"url": "llama.cpp", "engine_model": "Q8_0"})
    assert api.get("/v1/models/tiny").json()["engine"] == {"url": "llama.cpp", "model": "Q8_0", "via": "tokens"}
    session.refresh(tiny)
    assert not tiny.answered_elsewhere and export_facts.facts(session, tiny) is not None
    assert "Runs in llama.cpp" in client.get(f"/models/model-{tiny.id.hex}?tab=settings").text
    assert api.delete("/v1/engines/tiny").json()["engine"] is None
    done = api.post("/v1/engines", json={"model": "tiny", "url": "llama.cpp", "engine_model": "BF16"})
    assert done.json()["engine"]["model"] == "BF16"
