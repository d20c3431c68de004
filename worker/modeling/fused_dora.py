"""DoRA's magnitudes: each row of W + s B A is scaled to a trainable norm (Liu et al. 2024, https://arxiv.org/abs/2402.09353,
equation 5).

    y = c · (W + s B A) x,    c = m / ‖W + s B A‖ by rows, with the norm a constant for the gradient (section 4.3 there)

The row norms are computed without materializing W + s B A, whose N × K values would be written and read again in every pass. With
wₙ and bₙ the n-th rows of W and B:

    ‖wₙ + s bₙ A‖² = ‖wₙ‖² + 2 s bₙ · (A wₙ) + s² bₙ (A Aᵀ) bₙᵀ
"""

from __future__ import annotations

from typing import Any

import torch


def squares(weight: torch.Tensor) -> torch.Tensor:
    """‖wₙ‖² of each row of a frozen weight (N, K): (N,) in float32."""
    return torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square_()


@torch.no_grad()
def row_norms(weight: torch.Tensor, own: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float) -> torch.Tensor:
    """‖wₙ + s bₙ A‖ of each row, (N,) in float32, for W (N, K) of any dtype, `own` = its `squares` (N,), A (r, K) and B (N, r)."""
    across = (weight @ down.to(weight.dtype).t()).float()  # A wₙ
    gram = down @ down.t()
    return (own + (up * (2 * scale * across + scale**2 * (up @ gram))).sum(1)).clamp_min_(0).sqrt_()


class _ScaledRows(torch.autograd.Function):
    """y (T, N) times c (N,) in float32, rounded once. The output is kept for the backward pass instead of y, because the next
    layers often keep it too."""

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
    """y (T, ΣN), the concatenated outputs of layers, with each layer's rows scaled from their norms `rows` (N,) to its trainable
    `magnitudes` (N,)."""
    ratios = [m / length.clamp_min(torch.finfo(length.dtype).tiny) for m, length in zip(magnitudes, rows, strict=True)]
    return _ScaledRows.apply(y, ratios[0] if len(ratios) == 1 else torch.cat(ratios))
