"""The factor on the loss of a job in fp16, whose gradients would else be too small for its 5 bits of exponent (Micikevicius et al. 2018,
Mixed Precision Training, section 3.2). The GPU alone knows and changes it, so the host never waits."""

from __future__ import annotations

from collections.abc import Iterable

import torch

START, GROWTH, BACKOFF, PATIENCE = 2.0**14, 2.0, 0.5, 500
"""It doubles after so many steps without an overflow, and is halved after each with one, which the optimizer leaves out."""


class LossScale:
    def __init__(self, device: torch.device) -> None:
        self.factor = torch.full((), START, device=device)
        self._steps = torch.zeros((), dtype=torch.int32, device=device)

    def times(self, loss: torch.Tensor) -> torch.Tensor:
        return loss * self.factor

    def undo(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Divide the gradients by the factor: from here on they are what they are in every other format."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_mul_(gradients, self.factor.reciprocal())

    def adapt(self, norm: torch.Tensor) -> None:
        """Change the factor by the step's gradient norm, which is not finite where a product overflowed."""
        overflowed = (~torch.isfinite(norm)).to(torch.float32)
        torch._amp_update_scale_(self.factor, self._steps, overflowed, GROWTH, BACKOFF, PATIENCE)
