"""(IA)³'s scaling vectors without a float32 copy of what they scale. Same parameters, names and saved layout as peft's.

    y = l · x, rounded once;    dx = l · dy,    dl = Σ dy · x in float32

x (…, N) is the output of a frozen layer (keys and values) or its input (the last one of the feed-forward), l (N,) is trainable
(Liu et al. 2022, https://arxiv.org/abs/2205.05638, section 3.3).
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.ia3.layer import Linear as PeftIa3

from worker.modeling.fused_lora import ADAPTER, plain_linear


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, factors)
        return (x * factors).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        x, factors = ctx.saved_tensors
        dx = (dy * factors).to(dy.dtype) if ctx.needs_input_grad[0] else None
        return dx, (dy * x).flatten(0, -2).sum(0, dtype=torch.float32).to(factors.dtype)


class FusedIa3(PeftIa3):
    """Replaces the forward of peft's layer and nothing else."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters or self.merged or args or kwargs:
            return super().forward(x, *args, **kwargs)
        factors = self.ia3_l[ADAPTER].flatten()
        return self.base_layer(_Scaled.apply(x, factors)) if self.is_feedforward else _Scaled.apply(self.base_layer(x), factors)


def fuse(model: torch.nn.Module) -> int:
    """Give every layer with exactly one such adapter the forward above. Returns the number of layers changed."""
    found = [m for m in model.modules() if type(m) is PeftIa3 and list(m.ia3_l) == [ADAPTER] == m.active_adapters and plain_linear(m)]
    for layer in found:
        layer.__class__ = FusedIa3
    return len(found)
