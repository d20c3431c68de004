"""RMSNorm on a CPU in one pass each way (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467, equation 4).

torch composes it of single operations, each of which keeps a tensor for autograd. Here only the input and one value per row are
kept. With r = 1 / sqrt(mean(x²) + eps) and g = dy · weight:

    y = x · r · weight        dx = r · g − x · r³ · mean(g · x)        d weight = Σ dy · x · r

Where the kernel does not take the dtypes, the same formulas run in torch (`_RmsNorm`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from worker.kernels.cpu import jit
from worker.kernels.cpu.jit import KINDS, F, addresses, as_rows, kernel, row_of, to_bf16, to_f32


@kernel
def _forward(x, kind, weight, own, y, wanted, scales, rows, width, x_row, y_row, eps):
    W, R = row_of(weight, 0, 0, width, own), row_of(scales, 0, 0, rows, F(0))
    for i in range(rows):
        X, Y = row_of(x, i, x_row, width, kind), row_of(y, i, y_row, width, wanted)
        squares = F(0.0)
        for j in range(width):
            a = to_f32(X[j])
            squares += a * a
        r = F(1.0) / np.sqrt(squares / F(width) + F(eps))
        R[i] = r
        for j in range(width):
            Y[j] = to_bf16(to_f32(X[j]) * r * to_f32(W[j]), wanted)


@kernel
def _backward(x, kind, weight, own, scales, dy, given, dx, d_weight, rows, width, x_row, dy_row, dx_row):
    """`dx` or `d_weight` may be 0 and is then not computed."""
    W, R = row_of(weight, 0, 0, width, own), row_of(scales, 0, 0, rows, F(0))
    for i in range(rows):
        X, DY = row_of(x, i, x_row, width, kind), row_of(dy, i, dy_row, width, given)
        r = R[i]
        if d_weight != 0:
            DW = row_of(d_weight, 0, 0, width, F(0))
            for j in range(width):
                DW[j] += to_f32(DY[j]) * to_f32(X[j]) * r
        if dx != 0:
            DX = row_of(dx, i, dx_row, width, kind)
            pull = F(0.0)
            for j in range(width):
                pull += to_f32(DY[j]) * to_f32(W[j]) * to_f32(X[j])
            pull = pull * r * r * r / F(width)
            for j in range(width):
                DX[j] = to_bf16(to_f32(DY[j]) * to_f32(W[j]) * r - to_f32(X[j]) * pull, kind)


def _in_one(x: torch.Tensor, weight: torch.Tensor, eps: float, wanted: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of x (…, N) with weight (N,): y (…, N) in the dtype `wanted`, contiguous, and r (R,) in float32."""
    (rows, count, x_row), width = as_rows(x), x.shape[-1]
    y, r = torch.empty(x.shape, dtype=wanted), torch.empty(count)
    x_at, w_at, y_at, r_at = addresses(rows, weight, y, r)
    _forward(x_at, KINDS[x.dtype], w_at, KINDS[weight.dtype], y_at, KINDS[wanted], r_at, count, width, x_row, width * y.itemsize, eps)
    return y, r


def _in_one_back(
    x: torch.Tensor, weight: torch.Tensor, r: torch.Tensor, dy: torch.Tensor, needs_x: bool, needs_weight: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(dx in the dtype of x, d weight (N,) in float32); each is None where it is not needed."""
    (rows, count, x_row), (given, _, dy_row), width = as_rows(x), as_rows(dy), x.shape[-1]
    dx = torch.empty(x.shape, dtype=x.dtype) if needs_x else None
    d_weight = torch.zeros(width) if needs_weight else None
    x_at, w_at, r_at, dy_at, *results = addresses(rows, weight, r, given, dx, d_weight)
    kinds = KINDS[x.dtype], w_at, KINDS[weight.dtype], r_at, dy_at, KINDS[dy.dtype]
    _backward(x_at, *kinds, *results, count, width, x_row, dy_row, width * x.itemsize)
    return dx, d_weight


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, kind: torch.dtype) -> torch.Tensor:
        ctx.in_one = jit.supports(x, weight) and kind in KINDS and weight.shape == x.shape[-1:] and weight.is_contiguous()
        if ctx.in_one:
            y, r = _in_one(x, weight, eps, kind)
            ctx.save_for_backward(x, r, weight)
            return y
        full = _float(x)
        r = torch.linalg.vector_norm(full, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, r, weight)
        return full.mul(r).mul_(weight).to(kind)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, r, weight = ctx.saved_tensors
        if ctx.in_one:
            dx, d_weight = _in_one_back(x, weight, r, dy, *ctx.needs_input_grad[:2])
            return dx, None if d_weight is None else d_weight.to(weight.dtype), None, None
        full, dx, d_weight = _float(x), None, None
        if ctx.needs_input_grad[1]:
            d_weight = (full * r).mul_(dy).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            g = _float(dy) * weight
            pull = torch.linalg.vecdot(g, full).unsqueeze(-1).mul_(r.pow(3)).div_(-x.shape[-1])
            dx = g.mul_(r).addcmul_(full, pull).to(x.dtype)
        return dx, d_weight, None, None


def _float(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, kind: torch.dtype) -> torch.Tensor:
    """RMSNorm of x (…, H) with weight (H,), computed in float32 (float64 for float64) and rounded once to the dtype `kind`.
    Differentiable in x and weight."""
    return _RmsNorm.apply(x, weight, eps, kind)
