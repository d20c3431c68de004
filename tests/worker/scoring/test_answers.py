"""Answers to held-out rows: the likeliest tokens, as transformers' own `generate` writes them, and those that are finished in time."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from app.run_settings import RunSettings
from app.strategies.lora import Lora
from tests.worker.orders import put_model
from worker.modeling import packed_attention
from worker.modeling.loading import load_tokenizer
from worker.runtime.device import choose
from worker.scoring import answers as answers_module
from worker.scoring import sampler
from worker.scoring.answers import answers, answers_within
from worker.scoring.held_out import HeldOutPrompt

TEXTS = ("The luthier bends", "What wood is the belly of a violin", "Yes.", "A", "How long", "Where do I", "One two three four five six")


@pytest.fixture
def asked(data_dir: Path, tiny_model: Path) -> SimpleNamespace:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation=packed_attention.NAME).eval()
    tokenizer = load_tokenizer(put_model(tiny_model))
    rows = [HeldOutPrompt(text, tokenizer(text).input_ids, "") for text in TEXTS]
    return SimpleNamespace(model=model, tokenizer=tokenizer, rows=rows, engine=choose(RunSettings(precision="fp32"), Lora()))


def test_answers_are_those_of_transformers(asked: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer slots than prompts, in the order of the prompts; the padded way says the same."""
    monkeypatch.setattr(sampler, "AT_ONCE", 3)
    by_slots = answers(asked.model, asked.tokenizer, asked.rows, 9, asked.engine)
    monkeypatch.setattr(sampler, "reads_slots", lambda model: False)
    assert answers(asked.model, asked.tokenizer, asked.rows, 9, asked.engine) == by_slots
    asked.model.set_attn_implementation("eager")
    for row, text in zip(asked.rows, by_slots, strict=True):
        out = asked.model.generate(torch.tensor([row.ids]), max_new_tokens=9, do_sample=False, pad_token_id=asked.tokenizer.eos_token_id)
        assert text == asked.tokenizer.decode(out[0, len(row.ids) :], skip_special_tokens=True).strip()
    assert len(set(by_slots)) > 3


@pytest.mark.parametrize("slots", [True, False])
def test_answers_that_time_does_not_suffice_for_are_none(asked: SimpleNamespace, slots: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(sampler, "HURRIED_AT_ONCE", 3)
    monkeypatch.setattr(sampler, "PADDED_AT_ONCE", 3)
    monkeypatch.setattr(sampler, "reads_slots", lambda model: slots)
    every = answers(asked.model, asked.tokenizer, asked.rows, 4, asked.engine)
    clock = SimpleNamespace(monotonic=lambda: next(ticks))
    monkeypatch.setattr(sampler, "time", clock)
    monkeypatch.setattr(answers_module, "time", clock)
    told = answers_within(6, asked.model, asked.tokenizer, asked.rows, 4, asked.engine)
    assert 0 < sum(text is not None for text in told) < len(told)
    assert all(text in (None, plain) for text, plain in zip(told, every, strict=True))
    shortest = min(range(len(TEXTS)), key=lambda place: len(asked.rows[place].ids))
    assert told[shortest] == every[shortest], "they begin with the shortest"
    assert answers_within(0, asked.model, asked.tokenizer, asked.rows, 4, asked.engine) == [None] * len(TEXTS)
    assert answers_within(0, asked.model, asked.tokenizer, [], 4, asked.engine) == []
