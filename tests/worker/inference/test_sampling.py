"""Choosing a token, and showing text: statistics against the formula, and text cut at every possible place."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app.inference.protocol import Sampling
from tests.tiny import build_tokenizer
from worker.inference.sampling import CANDIDATES, Detokenizer, Sampler, logprob, token_bytes


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def draws(logits, count=4000, **sampling):
    chooser = Sampler(Sampling(**{"temperature": 1.0, "top_p": 1.0, **sampling}), 1, [])
    return Counter(chooser.draw(logits / chooser.heat, chooser.number()) for _ in range(count))


def test_draws_follow_the_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    p = logits.softmax(0)
    found = draws(logits)
    for token in range(4):
        assert abs(found[token] / 4000 - p[token]) < 0.03


@pytest.mark.long
def test_top_k_top_p_and_min_p_keep_what_they_say():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert set(draws(logits, top_k=2)) == {0, 1}
    assert set(draws(logits, top_p=0.6)) == {0, 1}
    assert set(draws(logits, top_p=0.45)) == {0}
    assert set(draws(logits, min_p=0.2)) == {0, 1, 2}
    assert abs(draws(logits, top_k=2)[0] / 4000 - 0.5 / 0.8) < 0.03


@pytest.mark.long
def test_flat_distributions_need_more_than_the_first_candidates():
    logits = torch.zeros(4 * CANDIDATES)
    assert len(draws(logits, top_p=0.9)) > 2.5 * CANDIDATES
    assert max(draws(logits, top_k=2 * CANDIDATES).values()) < 40


def test_penalties():
    logits = torch.tensor([1.0, 0.9, -1.0])
    chooser = Sampler(Sampling(temperature=0, frequency_penalty=0.2), 0, [])
    assert [chooser.choose(logits) for _ in range(3)] == [0, 1, 0]
    chooser = Sampler(Sampling(temperature=0, repetition_penalty=2.0), 0, prompt=[0])
    assert chooser.choose(logits) == 1
    assert Sampler(Sampling(temperature=0, logit_bias={2: 50}), 0, []).choose(logits) == 2
    assert logits.tolist() == pytest.approx([1.0, 0.9, -1.0])


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=40), st.lists(st.text(min_size=1, max_size=6), max_size=3))
def test_shown_text_is_the_text_before_the_first_stop(tokenizer, text, stops):
    """Byte by byte (each byte is a token of its own at worst), nothing shown is ever taken back."""
    text = text.encode("utf-8", "replace").decode().replace("�", "?")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    stream = Detokenizer(tokenizer, [], tuple(stops))
    parts = []
    for token in ids:
        parts.append(stream.push(token))
        if stream.stopped:
            break
    else:
        parts.append(stream.end())
    whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    cuts = [whole.find(s) for s in stops if s in whole]
    shown = "".join(parts)
    assert "�" not in shown
    if not cuts:
        assert shown == whole
    else:
        assert stream.stopped and whole.startswith(shown) and not any(s in shown for s in stops) and len(shown) >= min(cuts)


def test_half_a_character_is_held_and_then_dropped(tokenizer):
    ids = tokenizer("🧵", add_special_tokens=False)["input_ids"]
    assert len(ids) == 4
    stream = Detokenizer(tokenizer, [], ())
    assert [stream.push(i) for i in ids] == ["", "", "", "🧵"]
    stream = Detokenizer(tokenizer, [], ())
    assert [stream.push(i) for i in ids[:3]] == ["", "", ""] and stream.end() == ""


def test_logprobs_are_of_the_model_and_bytes_are_utf8(tokenizer):
    logits = torch.randn(512, generator=torch.Generator().manual_seed(0))
    said = logprob(tokenizer, logits, 100, 5)
    logs = logits.log_softmax(0)
    assert said.logprob == pytest.approx(float(logs[100])) and [t.logprob for t in said.top] == pytest.approx(logs.topk(5).values.tolist())
    ids = tokenizer("Geige 🧵 ü", add_special_tokens=False)["input_ids"]
    assert b"".join(token_bytes(tokenizer, i) for i in ids).decode() == "Geige 🧵 ü"
