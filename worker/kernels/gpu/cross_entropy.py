"""Softmax cross-entropy in one Triton kernel: a chunk of logits is overwritten with its gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def softmax_gradient_kernel(logits, targets, losses, stride, vocabulary: tl.constexpr, BLOCK: tl.constexpr):
    """One program per row: write its loss, then overwrite its logits with softmax − onehot(target)."""
    row = tl.program_id(0).to(tl.int64)
    here = logits + row * stride
    target = tl.load(targets + row)
    places = tl.arange(0, BLOCK)
    # Read before the loops: their reductions synchronize all warps, so none has overwritten it yet.
    picked = tl.load(here + tl.maximum(target, 0)).to(tl.float32)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        at = start + places
        x = tl.load(here + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, x)
        # A lane that has only seen masked positions has −inf as its maximum, and −inf − (−inf) would be NaN.
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        mass = mass * tl.exp(top - safe) + tl.exp(x - safe)
        top = higher
    peak = tl.max(top, 0)
    total = tl.sum(mass * tl.exp(top - peak), 0)
    learnt = target >= 0
    tl.store(losses + row, tl.where(learnt, tl.log(total) + peak - picked, 0.0))
    share = tl.where(learnt, 1.0 / total, 0.0)
    for start in range(0, vocabulary, BLOCK):
        at = start + places
        x = tl.load(here + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)
        p = tl.exp(x - peak) * share - tl.where(at == target, 1.0, 0.0)
        tl.store(here + at, p.to(logits.dtype.element_ty), mask=at < vocabulary)


def softmax_gradient_(logits: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor) -> None:
    """Overwrite `logits` (R, V) with d loss / d logits and fill `losses` (R,), float32; rows with a target below 0 give zeros.

    All logits are read twice and written once, the least that is possible between the two products around it.
    """
    rows, vocabulary = logits.shape
    block = min(8192, triton.next_power_of_2(vocabulary))
    warps = 16 if block >= 4096 else 8
    softmax_gradient_kernel[(rows,)](logits, targets, losses, logits.stride(0), vocabulary=vocabulary, BLOCK=block, num_warps=warps)
