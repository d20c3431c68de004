"""The general probe: every text scored, kept between jobs, and a verdict at the end of a job."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from app import events
from app.chat_templates import PLAIN
from app.evaluation.forgetting import TextScore
from app.run_settings import RunSettings
from app.settings import get_settings
from app.spec import Adapter, ModelRef
from app.strategies.lora import Lora
from tests.worker.orders import chat_rows, order, put_dataset, put_model
from worker import train
from worker.data.chat_template import prepare_tokenizer
from worker.modeling.loading import load_tokenizer
from worker.runtime.device import choose
from worker.scoring import forgetting
from worker.scoring.forgetting import ProbeCache


def tokenizer_of(ref: ModelRef) -> Any:
    tokenizer = load_tokenizer(ref)
    prepare_tokenizer(tokenizer)
    return tokenizer


def test_every_text_of_six_skills_is_scored(data_dir: Path, tiny_model: Path) -> None:
    probe = forgetting.Probe(tokenizer_of(put_model(tiny_model)), "dialogue", 2048)
    assert len(probe.data) == 72
    assert {skill: probe.skills.count(skill) for skill in set(probe.skills)} == dict.fromkeys(
        ("facts", "stories", "conversation", "instructions", "code", "arithmetic"), 12
    )
    assert all(size > 0 for size in probe.bytes)


@pytest.mark.long
def test_a_job_says_what_was_forgotten_and_the_base_is_scored_once(data_dir: Path, tiny_model: Path) -> None:
    model, data = put_model(tiny_model), put_dataset(chat_rows())
    gentle = order(model, data, "lora", epochs=1, learning_rate=1e-6, forgetting=True)
    told = list(train.train(gentle, data_dir / "runs" / "gentle" / "a1"))[-1]
    assert isinstance(told, events.Finished)
    assert told.forgetting["verdict"] == "within noise"
    assert math.isfinite(told.forgetting["before"])
    before = ProbeCache(model, tokenizer_of(model), choose(gentle.run, gentle.strategy)).read()
    assert before is not None and len(before) == 72 and len(list(get_settings().folder("features").glob("probe-*.json"))) == 2

    harsh = order(model, data, "full", epochs=6, learning_rate=2e-2, forgetting=True)
    told = list(train.train(harsh, data_dir / "runs" / "harsh" / "a1"))[-1]
    assert told.forgetting["before"] == pytest.approx(sum(s[1] for s in before) / math.log(2) / sum(s[2] for s in before))
    assert set(told.forgetting["skills"]) == {"facts", "stories", "conversation", "instructions", "code", "arithmetic"}
    assert told.forgetting["verdict"] != "within noise"

    quiet = order(model, data, "lora", epochs=1, forgetting=False)
    assert list(train.train(quiet, data_dir / "runs" / "quiet" / "a1"))[-1].forgetting is None


def test_scores_are_cached_by_all_that_they_depend_on(data_dir: Path, tiny_model: Path) -> None:
    ref = put_model(tiny_model)
    tokenizer = tokenizer_of(ref)
    engine = choose(RunSettings(precision="fp32"), Lora())
    adapter = Adapter(strategy="lora", path="runs/tuned", sha256="1" * 64)
    half, none = (adapter.model_copy(update={"blend": share}) for share in (0.5, 0.0))
    base = ProbeCache(ref, tokenizer, engine)
    assert ProbeCache(ref.model_copy(update={"adapters": (none,)}), tokenizer, engine).path == base.path
    changes = [{"adapters": (adapter,)}, {"adapters": (half,)}, {"kind": "generic"}, {"revision": "2" * 64}]
    others = [ProbeCache(ref.model_copy(update=change), tokenizer, engine).path for change in changes]
    others.append(ProbeCache(ref, tokenizer, engine, ["<tool>"]).path)
    others.append(ProbeCache(ref, tokenizer, engine, bits=4).path)
    others += [ProbeCache(ref, tokenizer, replace(engine, **change)).path for change in ({"frozen": torch.bfloat16}, {"fp8": True})]
    tokenizer.chat_template = PLAIN
    others.append(ProbeCache(ref, tokenizer, engine).path)
    assert len({base.path, *others}) == 10
    assert base.read() is None and base.keep([TextScore("facts", 2.0, 9)]) == base.read()
