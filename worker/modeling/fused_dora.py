"""DoRA's lengths: each row of W + s B A is brought to a length of its own that is learnt (Liu et al. 2024,
https://arxiv.org/abs/2402.09353, equation 5).

    y = c · (W + s B A) x,    c = m / ‖W + s B A‖ by rows, the lower part a constant to the gradient (section 4.3 there)

The rows' lengths are computed without making W + s B A, whose N × K numbers would be written and read again for every pass.
With wₙ and bₙ the n-th rows of W and B:

    ‖wₙ + s bₙ A‖² = ‖wₙ‖² + 2 s bₙ · (A wₙ) + s² bₙ (A Aᵀ) bₙᵀ
"""

from __future__ import annotations

from typing import Any

import torch


def squares(weight: torch.Tensor) -> torch.Tensor:
    """‖wₙ‖² of each row of a frozen weight (N, K), in float32."""
    return torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square_()


@torch.no_grad()
def row_norms(weight: torch.Tensor, own: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float) -> torch.Tensor:
    """‖wₙ + s bₙ A‖ of each row, (N,) in float32, for W (N, K) of any type, its `squares`, A (r, K) and B (N, r)."""
    across = (weight @ down.to(weight.dtype).t()).float()  # A wₙ
    gram = down @ down.t()
    return (own + (up * (2 * scale * across + scale**2 * (up @ gram))).sum(1)).clamp_min_(0).sqrt_()


class _Stretched(torch.autograd.Function):
    """y (T, N) times c (N,) in float32, rounded once. What it gives is kept instead of y: the layers after it often keep it too."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        out = (y * c).to(y.dtype)
        ctx.save_for_backward(out, c)
        return out

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, c = ctx.saved_tensors
        across = (dy * out).sum(0, dtype=torch.float32)
        return (dy * c).to(dy.dtype), torch.where(c == 0, 0, across / c)


def apply_magnitude(y: torch.Tensor, magnitudes: list[torch.Tensor], rows: list[torch.Tensor]) -> torch.Tensor:
    """y (T, ΣN), what the layers give side by side, with each layer's learnt magnitudes (N,) in place of its rows' `row_norms`."""
    ratios = [m / length.clamp_min(torch.finfo(length.dtype).tiny) for m, length in zip(magnitudes, rows, strict=True)]
    return _Stretched.apply(y, ratios[0] if len(ratios) == 1 else torch.cat(ratios))
