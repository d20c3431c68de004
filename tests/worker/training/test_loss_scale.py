"""Loss scaling for fp16: small gradients do not underflow, steps that overflow are skipped, and nothing else changes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import worker.train
from app import events
from app.settings import get_settings
from tests.worker.orders import chat_rows, order, put_dataset, put_model
from worker.runtime.device import Compute
from worker.train import train
from worker.training import backends, optim
from worker.training.backends import loss_scaled
from worker.training.backends._base import PlainBackend
from worker.training.backends.loss_scaled import START, LossScale, LossScaledBackend

CPU = torch.device("cpu")


def gradient(scale: LossScale | None) -> torch.Tensor:
    """Of a loss whose gradient passes through fp16 and is about 1e-8 there."""
    weight = torch.nn.Parameter(torch.ones(4))
    loss = (weight.half() * torch.full((4,), 1e-4, dtype=torch.float16)).float().mul(1e-4).sum()
    (scale.times(loss) if scale else loss).backward()
    if scale:
        scale.undo([weight])
    assert weight.grad is not None
    return weight.grad


def test_a_small_gradient_is_not_lost() -> None:
    assert not gradient(None).any()
    torch.testing.assert_close(gradient(LossScale(CPU)), torch.full((4,), 1e-8), rtol=1e-2, atol=0)


def test_an_overflow_changes_no_weight_and_halves_the_factor() -> None:
    weight, scale = torch.nn.Parameter(torch.ones(4)), LossScale(CPU)
    optimizer = optim.make_optimizer({"w": weight}, 1e-2, 0.0)
    for factor, moves in ((float("inf"), False), (1.0, True)):
        before = weight.detach().clone()
        scale.times((weight * factor).sum()).backward()
        scale.undo([weight])
        norm = optim.clip_grad_norm({"w": weight}, 1.0)
        scale.adapt(norm)
        optim.optimizer_step(optimizer, norm)
        optimizer.zero_grad()
        assert torch.equal(before, weight) != moves
    assert float(scale.factor) == START / 2


@pytest.mark.parametrize("strategy", ["lora", "adalora"])
def test_in_float32_a_scaled_step_is_the_plain_one(
    data_dir: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    """To the last bit: the factor is a power of two. AdaLoRA adds a term to the loss that is not scaled."""
    spec = order(put_model(tiny_model), put_dataset(chat_rows(32)), strategy, micro_batches=2, max_steps=4, validation_fraction=0.0)
    found = {}
    for kind in (PlainBackend, LossScaledBackend):
        monkeypatch.setattr(backends, "choose", lambda engine, strategy, run, kind=kind: kind(engine))
        said = list(train(spec, data_dir / "runs" / kind.name / "a1"))
        assert next(event.details["backend"] for event in said if isinstance(event, events.Started)) == kind.name
        found[kind] = [(event.loss, event.grad_norm) for event in said if isinstance(event, events.Step)]
    assert len(found[PlainBackend]) == 4 and found[PlainBackend] == found[LossScaledBackend]


def test_a_job_in_fp16_finds_its_factor_and_trains(data_dir: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, whose autocast knows fp16 too. More steps overflow at first than any other job may have."""
    monkeypatch.setenv("LUTHIER_KERNELS", "plain")
    get_settings.cache_clear()
    monkeypatch.setattr(loss_scaled, "START", 2.0**30)
    monkeypatch.setattr(worker.train, "choose", lambda *_: Compute(CPU, "cpu", "fp16", torch.float16, 1))
    spec = order(put_model(tiny_model), put_dataset(chat_rows(32)), max_steps=30, epochs=20, validation_fraction=0.0)
    said = list(train(spec, data_dir / "runs" / "job" / "a1"))
    steps = [event for event in said if isinstance(event, events.Step)]
    overflowed = [not math.isfinite(step.grad_norm) for step in steps]
    assert isinstance(said[-1], events.Finished) and next(event.precision for event in said if isinstance(event, events.Started)) == "fp16"
    assert PlainBackend.max_not_finite < sum(overflowed) < LossScaledBackend.max_not_finite and not any(overflowed[-5:])
    assert steps[-1].loss < steps[0].loss
