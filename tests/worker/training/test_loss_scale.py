"""fp16 has no room for small gradients: the loss is multiplied by a factor, and what overflows is left out."""

from __future__ import annotations

import torch

from worker.training import optim
from worker.training.loss_scale import START, LossScale

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
