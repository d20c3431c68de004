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
from worker.train import StopSignals, train
from worker.training import backends, checkpoint, optim
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
        monkeypatch.setattr(backends, "choose", lambda engine, *_, kind=kind: kind(engine))
        said = list(train(spec, data_dir / "runs" / kind.name / "a1"))
        assert next(event.details["backend"] for event in said if isinstance(event, events.Started)) == kind.name
        found[kind] = [(event.loss, event.grad_norm) for event in said if isinstance(event, events.Step)]
    assert len(found[PlainBackend]) == 4 and found[PlainBackend] == found[LossScaledBackend]


@pytest.fixture
def in_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs train in fp16 on the CPU, whose autocast knows it too, and begin with a factor that overflows."""
    monkeypatch.setenv("LUTHIER_KERNELS", "plain")
    get_settings.cache_clear()
    monkeypatch.setattr(loss_scaled, "START", 2.0**30)
    monkeypatch.setattr(worker.train, "choose", lambda *_: Compute(CPU, "cpu", "fp16", torch.float16, 1))


@pytest.mark.long
def test_a_job_in_fp16_finds_its_factor_and_trains(data_dir: Path, tiny_model: Path, in_fp16: None) -> None:
    """More steps overflow at first than any other job may have."""
    spec = order(put_model(tiny_model), put_dataset(chat_rows(32)), max_steps=30, epochs=20, validation_fraction=0.0)
    said = list(train(spec, data_dir / "runs" / "job" / "a1"))
    steps = [event for event in said if isinstance(event, events.Step)]
    overflowed = [not math.isfinite(step.grad_norm) for step in steps]
    assert isinstance(said[-1], events.Finished) and next(event.precision for event in said if isinstance(event, events.Started)) == "fp16"
    assert PlainBackend.max_not_finite < sum(overflowed) < LossScaledBackend.max_not_finite and not any(overflowed[-5:])
    assert steps[-1].loss < steps[0].loss


@pytest.mark.long
def test_a_resumed_job_goes_on_with_its_factor(data_dir: Path, tiny_model: Path, in_fp16: None) -> None:
    """To the last bit. A job that began again with the first factor would skip the steps that overflow with it."""
    spec = order(put_model(tiny_model), put_dataset(chat_rows(32)), max_steps=24, epochs=20, validation_fraction=0.0)
    whole, runs, control = list(train(spec, data_dir / "runs" / "whole" / "a1")), data_dir / "runs" / "resumed", StopSignals()
    said = []
    for event in train(spec, runs / "a1", runs, control):
        said.append(event)
        control.stop = control.stop or (isinstance(event, events.Step) and event.step == 16)
    kept = checkpoint.newest(runs)
    assert kept is not None and 0 < float(checkpoint.read_optimizer(kept)["factor/loss_scale"]) < loss_scaled.START
    said += train(spec, runs / "a2", runs)
    assert [event.resumed_from for event in said if isinstance(event, events.Started)] == [None, 16]
    assert all(event.exact for event in said if isinstance(event, events.Started))
    one, two = ([repr((event.loss, event.grad_norm)) for event in some if isinstance(event, events.Step)] for some in (whole, said))
    assert len(one) == 24 and one == two
    ends = [checkpoint.read_optimizer(checkpoint.newest(folder)) for folder in (data_dir / "runs" / "whole", runs)]  # type: ignore[arg-type]
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_a_checkpoint_of_another_precision_has_no_factor() -> None:
    scale = LossScale(CPU)
    scale.restore({"exp_avg/w": torch.ones(2)})
    assert float(scale.factor) == START
