"""Softmax cross-entropy on a CPU: a chunk of logits is overwritten with its gradient, in three passes over a row, which stays in
the core's L2 cache. `worker/kernels/gpu/cross_entropy.py` does the same on a GPU."""

from __future__ import annotations

import numpy as np
import torch

from worker.kernels.cpu.jit import KINDS, F, addresses, exp, kernel, maximum, rank, ranked, row_of, steps, to_bf16, to_f32


@kernel
def _softmax_loss(logits, kind, targets, losses, rows, width, row, scale, with_gradient):
    """The loss of each row; where `with_gradient`, its logits become scale · (softmax(scale · logits) − onehot(target))."""
    T, L, c = row_of(targets, 0, 0, rows, np.int64(0)), row_of(losses, 0, 0, rows, F(0)), F(scale)
    for i in range(rows):
        X = row_of(logits, i, row, width, kind)
        target = T[i]
        if target < 0:
            L[i] = F(0.0)
            if with_gradient:
                for j in range(width):
                    X[j] = to_bf16(F(0.0), kind)
            continue
        picked = to_f32(X[target]) * c
        highest = np.int32(-0x80000000)
        for j in range(width):
            highest = maximum(highest, rank(to_f32(X[j])))
        top = ranked(highest) * c
        mass = F(0.0)
        for j in range(width):
            mass += exp(to_f32(X[j]) * c - top)
        L[i] = np.log(mass) + top - picked
        if with_gradient:
            share = c / mass
            for j in range(width):
                X[j] = to_bf16(exp(to_f32(X[j]) * c - top) * share, kind)
            X[target] = to_bf16(exp(picked - top) * share - c, kind)


def softmax_loss_(
    logits: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor, scale: float = 1.0, with_gradient: bool = True
) -> None:
    """Write the cross-entropy of softmax(scale · logits) against `targets` into `losses`; with `with_gradient`, overwrite the logits
    with its gradient.

    logits (R, V) are bf16 or float32, targets (R,) int64, losses (R,) float32. A row with a target below 0 has loss 0 and
    gradient 0.

    Raises ValueError when the scale is not positive or the targets' shape or dtype is wrong, and IndexError for a target ≥ V.
    """
    if targets.dtype != torch.long or not targets.shape == losses.shape == logits.shape[:1]:
        raise ValueError(f"{tuple(targets.shape)} targets in {targets.dtype} for {logits.shape[0]} rows")
    if scale <= 0:
        raise ValueError("the logits' scale has to be above zero")
    if int(targets.max()) >= logits.shape[1]:
        raise IndexError(f"a target is {int(targets.max())}, of {logits.shape[1]} logits")
    x_at, targets_at, losses_at = addresses(logits, targets := targets.contiguous(), losses)
    _softmax_loss(x_at, KINDS[logits.dtype], targets_at, losses_at, *logits.shape, *steps(logits), scale, with_gradient)
