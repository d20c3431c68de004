"""AdamW (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101) on a CPU in one pass, over gradients kept in several
addends.

torch sums the parts' gradients, clips them, updates the weights and rounds these to bf16 in separate passes, which read and write
some 70 bytes per weight and step. Here the parts' gradients g₁ and g₂, in bf16 as the products wrote them, are summed, clipped
and used where they are read, and the weight is rounded where it is written: 34 bytes, including those for the gradient norm.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from worker.kernels.cpu.jit import F, addresses, inlined, kernel, row_of, to_bf16, to_f32

HALF = np.uint16(0)


class SplitGradient(NamedTuple):
    """A gradient (N, K) as a sum that is never materialized: s₁ g₁ + s₂ g₂ + rows of `sparse`."""

    first: torch.Tensor  # (N, K), bf16
    second: torch.Tensor
    scales: tuple[float, float]
    sparse: torch.Tensor  # (R + 1, K), float32; the last row is zero
    place: torch.Tensor | None  # (N,), int32: the row of `sparse` added to each row; None: the zero row

    def read_by(self) -> list[float]:
        """The arguments by which kernels read it."""
        return [*addresses(self.first, self.second, self.sparse, self.place), self.sparse.shape[0] - 1, self.first.shape[1], *self.scales]


class AdamWParams(NamedTuple):
    """AdamW hyperparameters of one parameter group."""

    rate: float
    decay: float
    betas: tuple[float, float]
    eps: float

    @classmethod
    def of(cls, group: dict[str, Any]) -> AdamWParams:
        """The hyperparameters of a parameter group of a torch optimizer."""
        return cls(group["lr"], group["weight_decay"], group["betas"], group["eps"])

    def at(self, step: int) -> tuple[float, float, float, float, float, float]:
        """The kernel's arguments in step number `step`, counted from 1: weight decay factor, β₁, β₂, learning rate and reciprocal
        root of the second moment, both with bias correction, and eps."""
        b1, b2 = self.betas
        return 1 - self.rate * self.decay, b1, b2, self.rate / (1 - b1**step), (1 - b2**step) ** -0.5, self.eps


def state_of(weight: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The AdamW state of a weight in a torch optimizer, created as torch would where there is none."""
    state = optimizer.state[weight]
    if not state:
        state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
    return state


@inlined
def _row(sparse, place, last, i, width):
    return row_of(sparse, row_of(place, i, 4, 1, np.int32(0))[0] if place else last, width * 4, width, F(0))


@kernel
def _square(first, second, sparse, place, last, width, scale1, scale2, start, stop):
    """Sum of squares of rows [start, stop). Two distant rows are read at a time: a core reads faster from four streams than from two."""
    s1, s2, total, half = F(scale1), F(scale2), 0.0, (stop - start + 1) // 2
    for i in range(start, start + half):
        k = min(i + half, stop - 1)
        A, B, E = row_of(first, i, width * 2, width, HALF), row_of(second, i, width * 2, width, HALF), _row(sparse, place, last, i, width)
        C, D, G = row_of(first, k, width * 2, width, HALF), row_of(second, k, width * 2, width, HALF), _row(sparse, place, last, k, width)
        mine, other = F(0.0), F(0.0)
        for j in range(width):
            g, h = to_f32(A[j]) * s1 + to_f32(B[j]) * s2 + E[j], to_f32(C[j]) * s1 + to_f32(D[j]) * s2 + G[j]
            mine += g * g
            other += h * h
        total += mine + (other if i + half < stop else F(0.0))  # type: ignore[assignment]  # numba makes one type of both
    return total


@kernel
def _move(
    first, second, sparse, place, last, width, scale1, scale2, start, stop, clip_coefficient, weight, mean, square, copy, keep, b1, b2, rate, root, eps
):  # fmt: skip
    s1, s2, s, k, r, d, e = F(scale1), F(scale2), F(clip_coefficient), F(keep), F(rate), F(root), F(eps)
    k1, n1, k2, n2 = F(b1), F(1.0 - b1), F(b2), F(1.0 - b2)
    for i in range(start, stop):
        A, B, E = row_of(first, i, width * 2, width, HALF), row_of(second, i, width * 2, width, HALF), _row(sparse, place, last, i, width)
        W, M = row_of(weight, i, width * 4, width, F(0)), row_of(mean, i, width * 4, width, F(0))
        V, C = row_of(square, i, width * 4, width, F(0)), row_of(copy, i, width * 2, width, HALF)
        for j in range(width):
            g = (to_f32(A[j]) * s1 + to_f32(B[j]) * s2 + E[j]) * s
            m, v = M[j] * k1 + g * n1, V[j] * k2 + g * g * n2
            w = W[j] * k - r * m / (np.sqrt(v) * d + e)
            M[j], V[j], W[j], C[j] = m, v, w, to_bf16(w, HALF)


class AdamWState(NamedTuple):
    """A weight (N, K) with AdamW's first and second moments, all float32, and the weight's bf16 copy."""

    weight: torch.Tensor
    mean: torch.Tensor
    square: torch.Tensor
    copy: torch.Tensor


def _check(gradient: SplitGradient, start: int, stop: int) -> None:
    height, width = gradient.first.shape
    for kind, shape, ones in (
        (torch.bfloat16, (height, width), gradient[:2]),
        (torch.float32, (gradient.sparse.shape[0], width), [gradient.sparse]),
        (torch.int32, (height,), [] if gradient.place is None else [gradient.place]),
    ):
        if any(x.shape != shape or x.dtype != kind or not x.is_contiguous() for x in ones):
            raise ValueError(f"{[(tuple(x.shape), x.dtype) for x in ones]} in a gradient of {height} by {width}")
    if not 0 <= start <= stop <= height:
        raise ValueError(f"rows {start} to {stop} of {height}")


def squares(gradient: SplitGradient, start: int, stop: int) -> float:
    """Sum of squares of rows [start, stop) of a gradient. Raises ValueError as `move_` does."""
    _check(gradient, start, stop)
    return _square(*gradient.read_by(), start, stop)


def move_(
    moved: AdamWState, gradient: SplitGradient, params: AdamWParams, step: int, clip_coefficient: float, start: int, stop: int
) -> None:
    """One AdamW update of rows [start, stop) of a weight, in place, in step number `step` (from 1), with `clip_coefficient` times its
    gradient.

    Raises ValueError when shapes or dtypes do not match or a tensor is not contiguous.
    """
    _check(gradient, start, stop)
    for kind, ones in ((torch.float32, moved[:3]), (torch.bfloat16, [moved.copy])):
        if any(x.shape != gradient.first.shape or x.dtype != kind or not x.is_contiguous() for x in ones):
            raise ValueError(f"{[(tuple(x.shape), x.dtype) for x in ones]} to move by a gradient of {tuple(gradient.first.shape)}")
    _move(*gradient.read_by(), start, stop, clip_coefficient, *addresses(*moved), *params.at(step))
