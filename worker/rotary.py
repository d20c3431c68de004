"""Rotary position embeddings on a CPU in three passes over queries and keys instead of seven, forwards and backwards.

transformers writes x · cos + rotate_half(x) · sin, which negates, joins, multiplies twice and adds, each a pass with memory of
its own (Su et al. 2021, RoFormer, https://arxiv.org/abs/2104.09864, in the form of GPT-NeoX). On a GPU the compiler makes one
kernel of that, so nothing is changed there.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

NAME = "apply_rotary_pos_emb"
Rotate = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class _Rotary(torch.autograd.Function):
    """x (…, T, D) turned by the angles of `cos` and `sin`, which broadcast to it: y₁ = x₁c₁ − x₂s₁, y₂ = x₂c₂ + x₁s₂."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.given = x.dtype
        half = x.shape[-1] // 2
        y = x * cos
        y[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        y[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        half = dy.shape[-1] // 2
        dx = dy * cos
        dx[..., :half].addcmul_(dy[..., half:], sin[..., half:])
        dx[..., half:].addcmul_(dy[..., :half], sin[..., :half], value=-1)
        return dx.to(ctx.given), None, None


def rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys, (B, heads, T, D), turned by `cos` and `sin`, (B, T, D)."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _Rotary.apply(q, cos, sin), _Rotary.apply(k, cos, sin)


def use_fused_rotary(model: torch.nn.Module, device: torch.device) -> int:
    """Have a model's layers on a CPU use `rotate` where their own function computes the same. Returns in how many of the modules
    that define the layers it stands now; 0 on a GPU."""
    if device.type != "cpu":
        return 0
    homes = {type(m).__module__ for m in model.modules()}
    return sum(_settle(sys.modules[home]) for home in homes if hasattr(sys.modules.get(home), NAME))


def _settle(home: Any) -> bool:
    own = getattr(home, NAME)
    if not hasattr(own, "plain"):
        if not _is_the_same(own):
            return False
        setattr(home, NAME, _chosen(own))
    return True


def _chosen(own: Rotate) -> Rotate:
    @functools.wraps(own)
    def turned(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *rest: Any, **more: Any) -> Any:
        whole = q.shape[-1] == k.shape[-1] == cos.shape[-1] and not rest and not more.keys() - {"unsqueeze_dim"}
        return (rotate if whole and q.device.type == "cpu" else own)(q, k, cos, sin, *rest, **more)

    turned.plain = own  # type: ignore[attr-defined]
    return turned


@torch.no_grad()
def _is_the_same(own: Rotate) -> bool:
    """Whether a function turns numbers as `rotate` does; other families turn neighbours, or a part of each head."""
    draw = torch.Generator().manual_seed(0)
    q, k, cos, sin = (torch.randn(shape, generator=draw) for shape in ((1, 2, 3, 8), (1, 1, 3, 8), (1, 3, 8), (1, 3, 8)))
    try:
        theirs, ours = own(q, k, cos, sin), rotate(q, k, cos, sin)
    except (TypeError, RuntimeError, IndexError, ValueError, AttributeError):
        return False
    return all(a.shape == b.shape and torch.allclose(a, b, atol=1e-5) for a, b in zip(theirs, ours, strict=True))
