"""Draws from probabilities by inverse transform sampling: one number from [0, 1) decides a token."""

from __future__ import annotations

import torch


def pick(p: torch.Tensor, u: float) -> int:
    """First index at which the cumulative sum of `p` exceeds `u` times its total; in float64, so that rounding does not hide the tail."""
    edges = p.double().cumsum(0)
    return min(int(torch.searchsorted(edges, u * edges[-1].item(), right=True)), len(p) - 1)


def pick_each(p: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """The same for each row of `p` (N, V) and each of `u` (N,) in float64."""
    edges = p.double().cumsum(1)
    return torch.searchsorted(edges, u[:, None] * edges[:, -1:], right=True)[:, 0].clamp(max=p.shape[1] - 1)
