"""What the settings of a run do to the training, each on a whole small job, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from pydantic import ValidationError

from app import events
from app.spec import JobSpec, RunSettings
from tests.worker.orders import chat_rows, order, put_dataset, put_model
from worker import train


def run(spec: JobSpec, data_dir: Path, job: str = "job") -> list:
    return list(train.train(spec, data_dir / "runs" / job / "a1"))


def in_two(spec: JobSpec, data_dir: Path, at: int) -> list:
    """The same job stopped behind step `at` and resumed, in which it has to say what it would have said without."""
    control, said = train.Control(), []
    for event in train.train(spec, data_dir / "runs" / "halved" / "a1", control=control):
        said.append(event)
        control.stop |= isinstance(event, events.Step) and event.step == at
    assert control.stopped
    rest = list(train.train(spec, data_dir / "runs" / "halved" / "a2"))
    assert of(rest, events.Started)[0].exact
    return [*said, *rest]


def same(one: list, other: list) -> None:
    """Two jobs have the same losses and the same weights."""
    first, second = ([(e.step, e.loss, e.grad_norm) for e in of(said, events.Step)] for said in (one, other))
    assert first == second
    weights = [said[-1].adapter_sha256 or said[-1].revision for said in (one, other)]
    assert weights[0] == weights[1]


def of(said: list, kind: type) -> list:
    return [event for event in said if isinstance(event, kind)]


TEN = {"max_steps": 10, "epochs": 50, "validation_fraction": 0, "learning_rate": 1e-3, "row_losses": False}
"""Ten steps and nothing else."""


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "linear", "warmup_steps": 2}, [0.5, 1, *(1 - i / 8 for i in range(8))]),
        ({"schedule": "wsd", "warmup_steps": 1, "decay_fraction": 0.4}, [1] * 7 + [0.75, 0.5, 0.25]),
        ({"schedule": "wsd", "warmup_fraction": 0, "decay_fraction": 0.2, "min_lr_fraction": 0.5}, [1] * 9 + [0.75]),
        (
            {"schedule": "cosine_with_restarts", "warmup_steps": 0, "num_cycles": 2},
            [0.5 * (1 + math.cos(math.pi * (i % 5) / 5)) for i in range(10)],
        ),
        (
            {"schedule": "cosine", "warmup_fraction": 0.2, "min_lr_fraction": 0.1},
            [0.5, 1, *(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8))],
        ),
    ],
)
def test_a_schedule_moves_the_learning_rate(data_dir: Path, tiny_model: Path, settings: dict, expected: list[float]) -> None:
    steps = of(run(order(put_model(tiny_model), put_dataset(chat_rows()), **TEN, **settings), data_dir), events.Step)
    assert [step.learning_rate for step in steps] == pytest.approx([1e-3 * share for share in expected])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"warmup_steps": 5, "warmup_fraction": 0.1}, "same as warmup_fraction"),
        ({"num_cycles": 3}, "for schedule cosine_with_restarts"),
        ({"schedule": "linear", "decay_fraction": 0.2}, "for schedule wsd"),
        ({"schedule": "constant", "min_lr_fraction": 0.2}, "schedule is constant"),
        ({"optimizer": "adafactor", "adam_beta2": 0.9}, "optimizer is adafactor"),
        ({"optimizer": "lion", "adam_epsilon": 1e-6}, "optimizer is lion"),
    ],
)
def test_a_setting_without_its_use_is_refused(settings: dict, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        RunSettings(**settings)


def test_a_stored_order_is_read_back_as_it_was() -> None:
    """Settings that came later are not written where nobody gave them, so that a job begun before goes on bit for bit."""
    for settings in ({}, {"warmup_steps": 5}, {"schedule": "wsd", "decay_fraction": 0.3}):
        assert RunSettings.model_validate(RunSettings(**settings).model_dump(mode="json")) == RunSettings(**settings)
    assert set(RunSettings().model_dump()) == BEFORE


@pytest.mark.parametrize(("kind", "strategy"), [("lion", "lora"), ("muon", "full"), ("adafactor", "lora")])
def test_a_job_learns_by_every_optimizer_and_resumes_bit_for_bit(data_dir: Path, tiny_model: Path, kind: str, strategy: str) -> None:
    rate = {"learning_rate": 2e-3 if kind == "lion" else 1e-2}
    spec = order(put_model(tiny_model), put_dataset(chat_rows()), strategy, **{**TEN, **rate}, optimizer=kind, max_tokens_per_step=640)
    whole = run(spec, data_dir)
    losses = [e.loss for e in of(whole, events.Step)]
    assert losses[-1] < losses[0] - 0.05
    same(in_two(spec, data_dir, 4), whole)


def test_lion_has_a_rate_of_its_own_where_nobody_says_one(data_dir: Path, tiny_model: Path) -> None:
    model, data = put_model(tiny_model), put_dataset(chat_rows(3))
    adamw, lion = (order(model, data, learning_rate=None, optimizer=kind).learning_rate for kind in ("adamw", "lion"))
    assert lion == pytest.approx(adamw / 5)


BEFORE = {
    "epochs", "learning_rate", "max_tokens_per_step", "max_length", "max_steps", "accumulation", "schedule", "warmup_fraction", "weight_decay",
    "max_grad_norm", "validation_fraction", "data_fraction", "evaluations_per_epoch", "early_stopping_patience", "samples", "sample_tokens",
    "forgetting", "row_losses", "precision", "optimizer", "gradient_checkpointing", "seed",
}  # fmt: skip
"""The settings that every stored job has."""
