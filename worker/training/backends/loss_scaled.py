"""Steps in fp16, on GPUs without bf16: the loss is multiplied by a factor, because gradients would otherwise underflow in fp16's 5 bits of
exponent (Micikevicius et al. 2018, Mixed Precision Training, https://arxiv.org/abs/1710.03740, section 3.2)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from worker.training import optim
from worker.training.backends._base import PlainBackend
from worker.training.objectives._base import TrainingObjective

START, GROWTH, BACKOFF, PATIENCE = 2.0**14, 2.0, 0.5, 500
"""The factor grows after `PATIENCE` steps without an overflow and is halved after each with one, whose optimizer step is skipped."""


class LossScale:
    """The factor. It stays on the device, so that the host never waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.factor = torch.full((), START, device=device)
        self._steps = torch.zeros((), dtype=torch.int32, device=device)

    def times(self, loss: torch.Tensor) -> torch.Tensor:
        return loss * self.factor

    def undo(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Divide the gradients by the factor."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_mul_(gradients, self.factor.reciprocal())

    def adapt(self, norm: torch.Tensor) -> None:
        """Change the factor by the step's gradient norm, which is not finite where a product overflowed."""
        overflowed = (~torch.isfinite(norm)).to(torch.float32)
        torch._amp_update_scale_(self.factor, self._steps, overflowed, GROWTH, BACKOFF, PATIENCE)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps, under names that no parameter has: a resumed job would overflow again on its way to the same factor."""
        return {"factor/loss_scale": self.factor.cpu(), "steps/loss_scale": self._steps.cpu()}

    def restore(self, saved: dict[str, torch.Tensor]) -> None:
        """Put back what `tensors` gave; a checkpoint that was not written in fp16 has none of it."""
        for name, own in (("factor", self.factor), ("steps", self._steps)):
            if (value := saved.get(f"{name}/loss_scale")) is not None:
                own.copy_(value)


class LossScaledBackend(PlainBackend):
    """The plain step with a scaled loss: gradients carry the factor from a part's backward pass until those of all processes are summed."""

    name = "loss_scaled"
    max_not_finite = 20  # the first steps may each halve the factor
    scale: LossScale

    def prepare(
        self, lesson: TrainingObjective, model: torch.nn.Module, optimizer: torch.optim.Optimizer, parts: int, saved: Path | None = None
    ) -> dict[str, Any]:
        self.scale = LossScale(self.engine.device)
        return super().prepare(lesson, model, optimizer, parts, saved)

    def restore(self, saved: dict[str, torch.Tensor]) -> None:
        super().restore(saved)
        self.scale.restore(saved)

    def optimizer_state(self) -> dict[str, torch.Tensor] | list[Path]:
        return optim.state_tensors(self.optimizer, self.trained) | self.scale.tensors()

    def differentiate(self, loss: torch.Tensor) -> None:
        self.scale.times(loss).backward()

    def sum_gradients(self) -> None:
        super().sum_gradients()
        self.scale.undo(self.trained.values())

    def grad_norm(self) -> torch.Tensor:
        norm = super().grad_norm()
        self.scale.adapt(norm)
        return norm
