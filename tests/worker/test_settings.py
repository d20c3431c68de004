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


BEFORE = {
    "epochs", "learning_rate", "max_tokens_per_step", "max_length", "max_steps", "accumulation", "schedule", "warmup_fraction", "weight_decay",
    "max_grad_norm", "validation_fraction", "data_fraction", "evaluations_per_epoch", "early_stopping_patience", "samples", "sample_tokens",
    "forgetting", "row_losses", "precision", "optimizer", "gradient_checkpointing", "seed",
}  # fmt: skip
"""The settings that every stored job has."""
