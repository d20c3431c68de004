"""Rotary position embeddings on a CPU in one pass over queries and keys instead of seven, forward and backward (Su et al. 2021,
RoFormer, https://arxiv.org/abs/2104.09864, in the layout of GPT-NeoX).

transformers writes x · cos + rotate_half(x) · sin, which negates, concatenates, multiplies twice and adds, each a pass with a
tensor of its own. On a GPU torch.compile fuses these, so nothing is changed there.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from worker import kernels
from worker.kernels.cpu import attention as amx_attention
from worker.kernels.cpu import jit
from worker.kernels.cpu.jit import KINDS, addresses, kernel, row_of, to_bf16, to_f32

NAME = "apply_rotary_pos_emb"
Rotate = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@kernel
def _rotate(x, kind, y, wanted, cos, sin, angles, heads, tokens, dim, x_head, x_token, y_token, c_token, s_token, size, back):
    """Rotate x (heads, T, D), with any strides, into y (T, heads, D). `back` applies the inverse rotation."""
    half = dim // 2
    for t in range(tokens):
        C, S = row_of(cos, t, c_token, dim, angles), row_of(sin, t, s_token, dim, angles)
        for h in range(heads):
            from_, to = x + h * x_head + t * x_token, y + t * y_token + h * dim * size
            X, Y = row_of(from_, 0, 0, dim, kind), row_of(to, 0, 0, dim, wanted)
            for j in range(half):
                a, b = to_f32(X[j]), to_f32(X[j + half])
                if back:
                    Y[j] = to_bf16(a * to_f32(C[j]) + b * to_f32(S[j + half]), wanted)
                    Y[j + half] = to_bf16(b * to_f32(C[j + half]) - a * to_f32(S[j]), wanted)
                else:
                    Y[j] = to_bf16(a * to_f32(C[j]) - b * to_f32(S[j]), wanted)
                    Y[j + half] = to_bf16(b * to_f32(C[j + half]) + a * to_f32(S[j + half]), wanted)


def _rotated(given: Sequence[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor, wanted: torch.dtype, back: bool) -> list[torch.Tensor]:
    """Each x (1, heads, T, D) rotated by cos and sin (1, T, D), in the dtype `wanted`."""
    _, _, tokens, dim = given[0].shape
    found = []
    angles = KINDS[cos.dtype], *(z.stride(1) * z.itemsize for z in (cos, sin))
    for x in given:
        x = x if x.stride(3) == 1 else x.contiguous()
        heads = x.shape[1]
        y = torch.empty(1, tokens, heads, dim, dtype=wanted)
        x_at, y_at, cos_at, sin_at = addresses(x, y, cos, sin)
        strides = x.stride(1) * x.itemsize, x.stride(2) * x.itemsize, heads * dim * y.itemsize, *angles[1:]
        kinds = KINDS[x.dtype], y_at, KINDS[wanted], cos_at, sin_at, angles[0]
        _rotate(x_at, *kinds, heads, tokens, dim, *strides, y.itemsize, back)
        found.append(y.transpose(1, 2))
    return found


class _InOnePass(torch.autograd.Function):
    """Queries and keys (1, heads, T, D) of one dtype rotated by cos and sin (1, T, D), in the dtype `wanted`, by the kernel."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, wanted: torch.dtype) -> Any:
        ctx.save_for_backward(cos, sin)
        ctx.given = q.dtype
        return tuple(_rotated((q, k), cos, sin, wanted, back=False))

    @staticmethod
    def backward(ctx: Any, *given: torch.Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return *_rotated(given, cos, sin, ctx.given, back=True), None, None, None


class _Rotary(torch.autograd.Function):
    """x (…, T, D) rotated by cos and sin, which broadcast to it, in torch: y₁ = x₁c₁ − x₂s₁, y₂ = x₂c₂ + x₁s₂."""

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
    """Queries and keys (B, heads, T, D) rotated by `cos` and `sin` (B, T, D); replaces transformers' `apply_rotary_pos_emb`."""
    if unsqueeze_dim == 1 and _in_one_pass(q, k, cos, sin):
        wanted = torch.promote_types(q.dtype, cos.dtype)
        if q.dtype == torch.bfloat16 and torch.is_autocast_enabled("cpu") and amx_attention.supports(q, k):
            wanted = q.dtype  # attention would round them to it anyway
        return _InOnePass.apply(q, k, cos, sin, wanted)
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _Rotary.apply(q, cos, sin), _Rotary.apply(k, cos, sin)


def _in_one_pass(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Whether the kernel takes these: one sequence or pack, matching shapes and dtypes, and constant angles."""
    return (
        q.shape[0] == k.shape[0] == 1
        and q.shape[2:] == k.shape[2:]
        and cos.shape == sin.shape == (1, *q.shape[2:])
        and q.dtype == k.dtype
        and cos.dtype == sin.dtype
        and not (cos.requires_grad or sin.requires_grad)
        and cos.stride(2) == sin.stride(2) == 1
        and jit.supports(q, k, cos, sin)
    )


def patch_rotary(model: torch.nn.Module, device: torch.device) -> int:
    """Replace `apply_rotary_pos_emb` by `rotate` in the modules that define a model's layers, where both compute the same.
    Returns the number of such modules; 0 on a GPU."""
    if device.type != "cpu":
        return 0
    homes = {type(m).__module__ for m in model.modules()}
    return sum(_patch(sys.modules[home]) for home in homes if hasattr(sys.modules.get(home), NAME))


def _patch(home: Any) -> bool:
    own = getattr(home, NAME)
    if not hasattr(own, "plain"):
        if not _is_the_same(own):
            return False
        setattr(home, NAME, _chosen(own))
    return True


def _chosen(own: Rotate) -> Rotate:
    @functools.wraps(own)
    def chosen(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *rest: Any, **more: Any) -> Any:
        whole = q.shape[-1] == k.shape[-1] == cos.shape[-1] and not rest and not more.keys() - {"unsqueeze_dim"}
        ours = whole and q.device.type == "cpu" and (torch.compiler.is_compiling() or kernels.allowed())
        return (rotate if ours else own)(q, k, cos, sin, *rest, **more)

    chosen.plain = own  # type: ignore[attr-defined]
    return chosen


@torch.no_grad()
def _is_the_same(own: Rotate) -> bool:
    """Whether a function computes what `rotate` does; some families rotate interleaved pairs, or only a part of each head."""
    draw = torch.Generator().manual_seed(0)
    q, k, cos, sin = (torch.randn(shape, generator=draw) for shape in ((1, 2, 3, 8), (1, 1, 3, 8), (1, 3, 8), (1, 3, 8)))
    try:
        theirs, ours = own(q, k, cos, sin), rotate(q, k, cos, sin)
    except (TypeError, RuntimeError, IndexError, ValueError, AttributeError):
        return False
    return all(a.shape == b.shape and torch.allclose(a, b, atol=1e-5) for a, b in zip(theirs, ours, strict=True))
