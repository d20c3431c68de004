"""Root-mean-square norm on a CPU in as few passes as its formula needs (Zhang and Sennrich 2019, equation 4).

torch composes it there of single operations, each of which autograd keeps something for. Here the input and one number a row
are kept. With r = 1 / sqrt(mean(x²) + eps) and g = dy · weight:

    y = x · r · weight        dx = r · g − x · r³ · mean(g · x)        d weight = Σ dy · x · r
"""

from __future__ import annotations

from typing import Any

import torch


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, kind: torch.dtype) -> torch.Tensor:
        wide = _wide(x)
        r = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, r, weight)
        return wide.mul(r).mul_(weight).to(kind)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, r, weight = ctx.saved_tensors
        wide, dx, d_weight = _wide(x), None, None
        if ctx.needs_input_grad[1]:
            d_weight = (wide * r).mul_(dy).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            g = _wide(dy) * weight
            pull = torch.linalg.vecdot(g, wide).unsqueeze(-1).mul_(r.pow(3)).div_(-x.shape[-1])
            dx = g.mul_(r).addcmul_(wide, pull).to(x.dtype)
        return dx, d_weight, None, None


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, kind: torch.dtype) -> torch.Tensor:
    """x (…, H) in any type, computed in float32 (float64 in its own) and rounded once to `kind`; gradients flow to x and weight (H,)."""
    return _RmsNorm.apply(x, weight, eps, kind)
