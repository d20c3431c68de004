"""Attention over packed sequences: none looks into another, and no time is spent on masks or padding.

Registered with transformers as `luthier_packed`, so every decoder that uses its attention interface gets it. The model is
called with one row of T tokens, positions that start again at 0 in each sequence, and the lengths of the sequences. A name
that transformers has no mask function for gets no mask, so no T × T mask is ever built.

On a CUDA device `torch.nn.attention.varlen` takes all sequences in one call. Elsewhere each sequence is a call of its own:
measured on two cores that equals padding the sequences to one batch for speed, and it wastes no memory.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

NAME = "luthier_packed"

try:
    from torch.nn.attention.varlen import varlen_attn

    _GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
except ImportError:  # torch before 2.10
    varlen_attn = None


def packed_arguments(lengths: list[int], device: torch.device) -> dict[str, Any]:
    """What the model's call needs beside ids and positions. `cu_seq_lens` are the sequences' ends, int32, beginning with 0."""
    if device.type != "cuda":
        return {"sequence_lengths": lengths}
    ends = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    ends[1:] = torch.tensor(lengths).cumsum(0)
    return {"sequence_lengths": lengths, "cu_seq_lens": ends.to(device, non_blocking=True), "longest": max(lengths)}


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # (1, heads, T, D)
    key: torch.Tensor,  # (1, kv heads, T, D)
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sequence_lengths: list[int] | None = None,
    cu_seq_lens: torch.Tensor | None = None,
    longest: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of each packed sequence to itself. Returns (1, T, heads, D)."""
    causal = getattr(module, "is_causal", True)
    lengths = sequence_lengths or [query.shape[2]]
    fast = varlen_attn is not None and cu_seq_lens is not None and query.dtype in (torch.bfloat16, torch.float16)
    if fast and softcap is None and query.shape[-1] <= 256 and not dropout:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        if not _GROUPED and k.shape[1] != q.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        window = ((sliding_window or 0) - 1, 0 if causal else -1)
        out = varlen_attn(q, k, v, cu_seq_lens, cu_seq_lens, longest, longest, scale=scaling, window_size=window, **_GROUPED)
        return out.unsqueeze(0), None
    # `split` rather than slices: its backward pass joins the pieces once, a slice's fills a whole (T, D) per sequence.
    pieces = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    out = [_one(q, k, v, scaling, dropout, causal, sliding_window, softcap).transpose(1, 2) for q, k, v in pieces]
    return torch.cat(out, 1), None


def _one(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None,
    dropout: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """One sequence, (1, heads, L, D). A mask is built only where a window or a soft cap asks for it."""
    length, grouped = q.shape[2], q.shape[1] != k.shape[1]
    if softcap is None and (window is None or length <= window):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped)
    places = torch.arange(length, device=q.device)
    seen = places[:, None] - places[None, :]  # how far back a key lies
    allowed = torch.ones_like(seen, dtype=torch.bool) if not causal else seen >= 0
    if window is not None:
        allowed &= seen.abs() < window
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout, scale=scale, enable_gqa=grouped)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * (scale if scale is not None else q.shape[-1] ** -0.5)
    scores = (torch.tanh(scores / softcap) * softcap).masked_fill(~allowed, float("-inf"))
    return F.dropout(scores.softmax(-1), dropout) @ v


AttentionInterface.register(NAME, packed_attention)
