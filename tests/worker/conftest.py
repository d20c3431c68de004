"""One small model per test session, loaded where a test needs it."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path):
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def network(tiny_model: Path):
    from worker.modeling import packed_attention

    return AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation=packed_attention.NAME)
