"""The benchmark of generation measures on the small model what it says, in its own process and of a running studio."""

from __future__ import annotations

import os

import pytest

from benchmarks import generation
from tests.generating import _workers, answering_dir, generate_worker, register_tiny  # noqa: F401


def test_the_engine_beside_plain_generate(data_dir, tiny_model):
    found = generation.of_engine(tiny_model, tokens=6, chats=3, adapters=2, rounds=1)
    assert (found["tokens"], found["chats"], found["adapters"]) == (6, 3, 2)
    assert all(speed > 0 for speed in found["tokens_per_second"].values()) and len(found["tokens_per_second"]) == 4
    assert 0 < found["first_token_seconds"]["p50"] <= found["first_token_seconds"]["p95"]
    text = generation.as_text(found)
    assert "goal: p50 under 300 ms, " in text and "goal: at least 3, " in text and "padded batch" in text
    slow = found | {"first_token_seconds": {"p50": 0.4, "p95": 0.5}, "crowd_over_alone": 3.5}
    assert [goal["reached"] for goal in generation.goals(slow).values()] == [False, True] and "NOT REACHED" in generation.as_text(slow)


def test_a_running_studio(openai_client, generate_worker, session, monkeypatch):  # noqa: F811
    base = register_tiny(session)
    monkeypatch.setenv("LUTHIER_API_KEY", openai_client.api_key)
    address = str(openai_client.base_url).removesuffix("/v1/")
    found = generation.of_studio(address, [], tokens=5, chats=3, rounds=1)
    assert found["model"] == base.name and found["tokens_per_second"]["engine_crowd"] > 0 and "goal" in generation.as_text(found)
    with pytest.raises(SystemExit, match="nobody"):
        generation.of_studio(address, ["nobody"], tokens=5, chats=1, rounds=1)
    del os.environ["LUTHIER_API_KEY"]
    with pytest.raises(SystemExit, match="luthier keys create"):
        generation.of_studio(address, [], tokens=5, chats=1, rounds=1)
