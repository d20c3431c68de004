"""The key-value cache of running requests, and the attention that reads it.

A step feeds the model one flat row of tokens, (1, N), taken from many requests: one token of each that is answering,
and a chunk of each whose prompt is still being read. Everything but attention treats a token by itself, so a flat row
is exact; attention finds in the `Step` which token belongs to which slot of the cache. So requests of any length join
and leave at every step, nothing is padded, and no request sees another.

The attention is registered with transformers under the name `luthier_slots` and writes the cache itself: the model is
called with `use_cache=False` and explicit positions, and needs no mask (Kwon et al. 2023, "Efficient Memory Management
for Large Language Model Serving with PagedAttention", section 4, describes the same separation with pages).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

if TYPE_CHECKING:
    from worker.adapters import Selection

ATTENTION = "luthier_slots"
_current = threading.local()


class Segment(NamedTuple):
    """`count` tokens of one request, at `start` of the flat row; `past` tokens of it are in the cache already."""

    slot: int
    start: int
    count: int
    past: int


class SlotCache:
    """Keys and values, for each layer (slots, heads, capacity, width). `tokens[slot]` says which tokens stand there."""

    def __init__(self, slots: int, capacity: int) -> None:
        self.slots, self.capacity = slots, capacity
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.tokens: list[list[int]] = [[] for _ in range(slots)]
        self.owner: list[Any] = [None] * slots

    def layer(self, index: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's tensors, made when it is first seen, so that any mix of head counts and widths is right."""
        found = self.layers.get(index)
        if found is None:
            found = self.layers[index] = (
                key.new_zeros(self.slots, key.shape[1], self.capacity, key.shape[3]),
                value.new_zeros(self.slots, value.shape[1], self.capacity, value.shape[3]),
            )
        return found

    def grow(self, slots: int, capacity: int) -> None:
        """Make room; what stands in the cache stays."""
        slots, capacity = max(slots, self.slots), max(capacity, self.capacity)
        if (slots, capacity) == (self.slots, self.capacity):
            return
        for index, pair in self.layers.items():
            grown = []
            for old in pair:
                new = old.new_zeros(slots, old.shape[1], capacity, old.shape[3])
                new[: self.slots, :, : self.capacity] = old
                grown.append(new)
            self.layers[index] = (grown[0], grown[1])
        self.tokens += [[] for _ in range(slots - self.slots)]
        self.owner += [None] * (slots - self.slots)
        self.slots, self.capacity = slots, capacity

    def fork(self, source: int, target: int) -> None:
        """Copy a slot: several answers to one prompt read it once."""
        length = len(self.tokens[source])
        for pair in self.layers.values():
            for tensor in pair:
                tensor[target, :, :length] = tensor[source, :, :length]
        self.tokens[target] = list(self.tokens[source])
        self.owner[target] = self.owner[source]

    def nbytes(self) -> int:
        return sum(t.nbytes for pair in list(self.layers.values()) for t in pair)


@dataclass
class Step:
    """One forward pass. `decode` are the segments of one token, first in the flat row and in order of slot."""

    cache: SlotCache
    decode: list[Segment]
    prefill: list[Segment]
    device: torch.device
    selection: Selection | None = None
    _made: dict[Any, Any] = field(default_factory=dict)

    def places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Slot and position of every decoding token, for one write."""
        if "places" not in self._made:
            self._made["places"] = (
                torch.tensor([s.slot for s in self.decode], device=self.device),
                torch.tensor([s.past for s in self.decode], device=self.device),
            )
        return self._made["places"]

    def span(self) -> tuple[int, int, int, torch.Tensor | None]:
        """First and last slot that decode, the longest length among them, and where in the span the rows stand
        (None when every slot of the span decodes)."""
        if "span" not in self._made:
            low, high = self.decode[0].slot, self.decode[-1].slot + 1
            longest = max(s.past for s in self.decode) + 1
            rows = None if high - low == len(self.decode) else torch.tensor([s.slot - low for s in self.decode], device=self.device)
            self._made["span"] = (low, high, longest, rows)
        return self._made["span"]

    def decode_mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """(span, 1, 1, longest): minus infinity where a row must not look. Made once per step, not per layer."""
        if ("decode", window) not in self._made:
            low, high, longest, rows = self.span()
            last = torch.zeros(high - low, 1, dtype=torch.long, device=self.device)
            past = self.places()[1][:, None]
            last[rows if rows is not None else slice(None)] = past
            at = torch.arange(longest, device=self.device)
            seen = at <= last
            if window is not None:
                seen &= at > last - window
            mask = torch.zeros(seen.shape, dtype=dtype, device=self.device).masked_fill_(~seen, float("-inf"))
            self._made["decode", window] = mask[:, None, None, :]
        return self._made["decode", window]

    def prefill_mask(self, segment: Segment, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """(count, past + count), causal, and no further back than the window."""
        if (segment, window) not in self._made:
            query = torch.arange(segment.past, segment.past + segment.count, device=self.device)[:, None]
            at = torch.arange(segment.past + segment.count, device=self.device)
            seen = at <= query
            if window is not None:
                seen &= at > query - window
            self._made[segment, window] = torch.zeros(seen.shape, dtype=dtype, device=self.device).masked_fill_(~seen, float("-inf"))
        return self._made[segment, window]


@contextmanager
def running(step: Step) -> Iterator[None]:
    """The step that attention and adapters see; models differ in which arguments they pass on, so it stands here."""
    _current.step = step
    try:
        yield
    finally:
        _current.step = None


def current_step() -> Step | None:
    return getattr(_current, "step", None)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float | None, cap: float | None, **how: Any
):
    """Attention of (B, H, T, D); `cap` squashes the scores, which the fused kernel cannot."""
    if cap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, **how)
    scores = q @ k.transpose(-1, -2) * (scale if scale is not None else q.shape[-1] ** -0.5)
    scores = torch.tanh(scores / cap) * cap
    return (scores if mask is None else scores + mask).softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def slot_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # (1, H, N, D)
    key: torch.Tensor,  # (1, H_kv, N, D)
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    step = current_step()
    if step is None or query.shape[0] != 1:
        raise RuntimeError("luthier_slots attention runs inside an engine step only.")
    keys, values = step.cache.layer(module.layer_idx, key, value)
    _, heads, n, _ = query.shape
    out = query.new_empty(n, heads, value.shape[-1])
    if step.decode:
        _decode(step, query[0], key[0], value[0], keys, values, out, scaling, sliding_window, softcap)
    for segment in step.prefill:
        _prefill(step, segment, query[0], key[0], value[0], keys, values, out, scaling, sliding_window, softcap)
    return out[None], None


def _decode(step, query, key, value, keys, values, out, scale, window, cap) -> None:
    """All rows with one new token. Queries of the heads that share keys stand in one block, so nothing is repeated."""
    count, (heads, kv_heads) = len(step.decode), (query.shape[0], key.shape[0])
    slots, positions = step.places()
    keys[slots, :, positions] = key[:, :count].transpose(0, 1)
    values[slots, :, positions] = value[:, :count].transpose(0, 1)
    low, high, longest, rows = step.span()
    blocks = query[:, :count].transpose(0, 1).reshape(count, kv_heads, heads // kv_heads, -1)
    first, mask = 0, None
    if count == 1:
        first = max(0, longest - window) if window is not None else 0
    else:
        mask = step.decode_mask(window, query.dtype)
        if rows is not None:
            blocks = blocks.new_zeros(high - low, *blocks.shape[1:]).index_copy_(0, rows, blocks)
    answer = _attend(blocks, keys[low:high, :, first:longest], values[low:high, :, first:longest], mask, scale, cap)
    if rows is not None:
        answer = answer[rows]
    out[:count] = answer.reshape(count, heads, -1)


def _prefill(step, segment, query, key, value, keys, values, out, scale, window, cap) -> None:
    """A chunk of one prompt, after what of it stands in the cache already."""
    slot, start, count, past = segment
    here, end = slice(start, start + count), past + count
    keys[slot, :, past:end] = key[:, here]
    values[slot, :, past:end] = value[:, here]
    groups = query.shape[0] // key.shape[0]
    k, v = keys[slot : slot + 1, :, :end], values[slot : slot + 1, :, :end]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    plain = past == 0 and cap is None and (window is None or count <= window)
    how = {"is_causal": True} if plain else {}
    mask = None if plain else step.prefill_mask(segment, window, query.dtype)
    out[here] = _attend(query[None, :, here], k, v, mask, scale, cap, **how)[0].transpose(0, 1)


AttentionInterface.register(ATTENTION, slot_attention)
