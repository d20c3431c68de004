"""The profile: a few steps recorded, told in words, and nothing changed in what is learnt."""

from __future__ import annotations

import json

import pytest

from app import events
from tests.worker.orders import chat_rows, order, put_dataset, put_model
from worker.profile import kind_of, profiled, summary
from worker.train import train


@pytest.fixture
def spec(data_dir, tiny_model):
    return order(put_model(tiny_model), put_dataset(chat_rows(24)), epochs=8, max_steps=8)


def test_a_profiled_job_is_the_same_job(spec, data_dir):
    plain = list(train(spec, data_dir / "runs" / "plain" / "a1"))
    folder = data_dir / "runs" / "seen" / "a1"
    seen = list(profiled(train(spec, folder), spec, folder))
    losses = [[e.loss for e in run if isinstance(e, events.Step)] for run in (plain, seen)]
    assert losses[0] == losses[1]
    text = (folder / "profile" / "summary.txt").read_text()
    assert "matrix products" in text and "Floor:" in text and "Largest gap:" in text
    assert any(isinstance(e, events.Log) and e.message == text.strip() for e in seen)
    names = {e.get("name") for e in json.loads((folder / "profile" / "trace.json").read_text())["traceEvents"]}
    assert any(str(name).startswith("aten::") for name in names)


def test_a_short_job_says_why_it_has_no_profile(spec, data_dir):
    short = spec.model_copy(update={"run": spec.run.model_copy(update={"max_steps": 4})})
    folder = data_dir / "runs" / "short" / "a1"
    said = list(profiled(train(short, folder), short, folder))
    assert "no profile" in said[-1].message
    assert not (folder / "profile").exists()


def test_the_floor_is_arithmetic(spec):
    """At half of the machine's speed the steps take twice the floor."""
    from app.estimate import operations_per_token

    work = operations_per_token(spec.model.shape, spec.strategy, 0.5) * 1000
    text = summary(spec, {"matrix products": 1.0, "copies and casts": 0.25}, 1000, 500, 2.0, work, 1e15)
    assert "2.0 times the floor" in text
    assert "copies and casts (20% of the time)" in text


@pytest.mark.parametrize(
    ("operation", "kind"),
    [("aten::mm", "matrix products"), ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"), ("aten::copy_", "copies and casts"),
     ("aten::silu", "activations and other element-wise work"), ("something", "other")],
)  # fmt: skip
def test_kinds(operation, kind):
    assert kind_of(operation) == kind
