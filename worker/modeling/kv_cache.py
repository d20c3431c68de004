"""The KV cache of running requests, and the attention that reads it.

A step feeds the model one flat row of tokens, (1, N), taken from many requests: one token of each sequence that is decoding, and
a chunk of each prompt that is in prefill. Everything but attention treats tokens independently, so a flat row is exact; attention
finds in the `ForwardPass` which token belongs to which slot of the cache. So requests of any length join and leave at every step,
nothing is padded, and no request sees another.

A slot is a block of one of a few sizes. A sequence begins in a small one and moves to one four times as large when it is full, so
a long answer takes no memory from short ones, and all slots of one size are read by one product.

The attention is registered with transformers as `luthier_slots` and writes the cache itself: the model is called with
`use_cache=False` and explicit positions, and needs no mask (Kwon et al. 2023, PagedAttention, https://arxiv.org/abs/2309.06180,
section 4, separates model and cache in the same way, with pages).
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, cast

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from worker.runtime.transfer import sent

ATTENTION = "luthier_slots"
MIN_TOKENS = 256
TIMES = 4
_current = threading.local()


@dataclass(eq=False)
class Slot:
    """The cache of one sequence. `tokens` are the tokens it holds, computed under the adapters `owner`; they are kept for prefix
    reuse after the sequence has ended."""

    blocks: Blocks
    index: int
    tokens: list[int] = field(default_factory=list)
    owner: Any = None
    busy: bool = False


@dataclass(frozen=True, slots=True)
class Segment:
    """`count` tokens of one request, at `start` of the flat row; `past` tokens of it are in the cache already."""

    slot: Slot
    start: int
    count: int
    past: int


_stamps = itertools.count()


class Blocks:
    """All slots of one size: keys and values, for each layer (slots, heads, size, width). `stamp` changes with these tensors."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.stamp = next(_stamps)
        self.slots: list[Slot] = []
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def layer(self, index: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's key and value tensors, allocated on first use, so that layers may differ in their numbers of heads and widths."""
        found = self.layers.get(index)
        if found is None:
            found = self.layers[index] = (
                key.new_zeros(len(self.slots), key.shape[1], self.size, key.shape[3]),
                value.new_zeros(len(self.slots), value.shape[1], self.size, value.shape[3]),
            )
        return found

    def grow(self, count: int) -> None:
        """Add slots; the contents of the existing ones are kept."""
        old = len(self.slots)
        self.slots += [Slot(self, old + i) for i in range(count)]
        for index, pair in self.layers.items():
            grown = [t.new_zeros(len(self.slots), *t.shape[1:]) for t in pair]
            for new, tensor in zip(grown, pair, strict=True):
                new[:old] = tensor
            self.layers[index] = (grown[0], grown[1])
        self.stamp = next(_stamps)


class Cache:
    """The slots of one loaded model. It grows only when told to: `MemoryBudget` decides who may take how much."""

    def __init__(self, context: int, bytes_per_token: int) -> None:
        self.context, self.bytes_per_token = context, bytes_per_token
        self.blocks: dict[int, Blocks] = {}

    def size_for(self, tokens: int) -> int:
        """The smallest slot size that holds this many tokens."""
        size = min(MIN_TOKENS, self.context)
        while size < tokens:
            size = min(size * TIMES, self.context)
        return size

    def bytes_for(self, tokens: int) -> int:
        return self.size_for(tokens) * self.bytes_per_token

    def slots(self) -> Iterator[Slot]:
        for blocks in self.blocks.values():
            yield from blocks.slots

    def idle(self, size: int) -> Slot | None:
        """An idle slot of this size; the one that holds the fewest reusable tokens."""
        blocks = self.blocks.get(size)
        free = [slot for slot in blocks.slots if not slot.busy] if blocks else []
        return min(free, key=lambda slot: (len(slot.tokens), slot.index), default=None)

    def grow(self, size: int, count: int) -> None:
        self.blocks.setdefault(size, Blocks(size)).grow(count)

    def trim(self) -> None:
        """Free all sizes of which no slot is in use, at once: slots and blocks refer to each other."""
        for blocks in self.blocks.values():
            if not any(slot.busy for slot in blocks.slots):
                blocks.layers.clear()
        self.blocks = {size: blocks for size, blocks in self.blocks.items() if any(slot.busy for slot in blocks.slots)}

    def copy(self, source: Slot, target: Slot, count: int) -> None:
        """Copy the first `count` tokens of one slot to another: several answers to one prompt read it once."""
        for index, pair in source.blocks.layers.items():
            for old, new in zip(pair, target.blocks.layer(index, *pair), strict=True):
                new[target.index, :, :count] = old[source.index, :, :count]
        target.tokens, target.owner = source.tokens[:count], source.owner

    def wipe(self, slot: Slot) -> None:
        """Clear a slot, including its values: a NaN or infinity left there would reach the next sequence through masked positions."""
        for pair in slot.blocks.layers.values():
            for tensor in pair:
                tensor[slot.index] = 0
        slot.tokens = []

    def idle_bytes(self) -> int:
        return sum(slot.blocks.size * self.bytes_per_token for slot in self.slots() if not slot.busy)

    def nbytes(self) -> int:
        return sum(len(blocks.slots) * size * self.bytes_per_token for size, blocks in list(self.blocks.items()))


@dataclass(frozen=True)
class Selection:
    """The part of the adapter stack that a step needs: columns `low:high` hold all of its adapters. `mask` (N, high − low) is 1
    at a token's own columns; None when all tokens use all of these columns."""

    low: int
    high: int
    mask: torch.Tensor | None


@dataclass
class ForwardPass:
    """One forward pass. `decode` are the segments of one token, first in the flat row, ordered by slot size and index."""

    decode: list[Segment]
    prefill: list[Segment]
    device: torch.device
    selection: Selection | None = None
    _made: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, groups: list[DecodeGroup], device: torch.device, selection: Selection | None) -> ForwardPass:
        """A step that only decodes, with its groups given."""
        step = cls([], [], device, selection)
        step._made["groups"] = groups
        return step

    def groups(self) -> list[DecodeGroup]:
        """The decoding segments, grouped by the size of their slots."""
        if "groups" not in self._made:
            found = groupby(self.decode, key=lambda segment: segment.slot.blocks)
            self._made["groups"] = [DecodeGroup.of(blocks, list(segments), self.device) for blocks, segments in found]
        return self._made["groups"]

    def prefill_mask(self, segment: Segment, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """Causal mask (count, past + count), limited to the window."""
        key = (segment.start, window)
        if key not in self._made:
            query = torch.arange(segment.past, segment.past + segment.count, device=self.device)[:, None]
            at = torch.arange(segment.past + segment.count, device=self.device)
            seen = at <= query
            if window is not None:
                seen &= at > query - window
            self._made[key] = torch.zeros(seen.shape, dtype=dtype, device=self.device).masked_fill_(~seen, float("-inf"))
        return self._made[key]


@dataclass(eq=False)
class DecodeGroup:
    """Decoding sequences whose slots have the same size: one product reads the span of slots from `low` to `high`."""

    blocks: Blocks
    begin: int  # in the flat row
    end: int
    low: int
    high: int
    longest: int
    slots: torch.Tensor
    positions: torch.Tensor
    rows: torch.Tensor | None  # index of each sequence within the span; None when every slot of it decodes
    whole: bool = False  # the span is a copy of the slots of these sequences, which nothing but the tensors says
    _masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, blocks: Blocks, segments: list[Segment], device: torch.device) -> DecodeGroup:
        begin, end = segments[0].start, segments[-1].start + 1
        low, high = segments[0].slot.index, segments[-1].slot.index + 1
        slots = sent(torch.tensor([s.slot.index for s in segments]), device)
        positions = sent(torch.tensor([s.past for s in segments]), device)
        rows = None if high - low == len(segments) else slots - low
        return cls(blocks, begin, end, low, high, max(s.past for s in segments) + 1, slots, positions, rows)

    @classmethod
    def of_whole_slots(cls, blocks: Blocks, begin: int, slots: torch.Tensor, positions: torch.Tensor) -> DecodeGroup:
        """A group whose sequences are known to the device alone, (R,) slots and positions."""
        count = len(slots)
        return cls(blocks, begin, begin + count, 0, count, blocks.size, slots, positions, None, True)

    def mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """(span, 1, 1, longest): −inf at positions a sequence must not attend to. Computed once per step, not per layer."""
        if window not in self._masks:
            last = torch.zeros(self.high - self.low, 1, dtype=torch.long, device=self.positions.device)
            last[self.rows if self.rows is not None else slice(None)] = self.positions[:, None]
            at = torch.arange(self.longest, device=last.device)
            seen = at <= last
            if window is not None:
                seen &= at > last - window
            mask = torch.zeros(seen.shape, dtype=dtype, device=last.device).masked_fill_(~seen, float("-inf"))
            self._masks[window] = mask[:, None, None, :]
        return self._masks[window]


def reads_slots(model: Any) -> bool:
    """Whether the attention of a transformers model can read from slots: it takes one from outside, and no layer borrows another's keys."""
    return bool(model._supports_attention_backend) and not getattr(model.config, "num_kv_shared_layers", 0)


@contextmanager
def running(step: ForwardPass) -> Iterator[None]:
    """Set the step that attention and adapters see. It is no argument, because models differ in which arguments they pass on."""
    _current.step = step
    try:
        yield
    finally:
        _current.step = None


def current_step() -> ForwardPass | None:
    return getattr(_current, "step", None)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float | None, cap: float | None, **how: Any
):
    """Attention of (B, H, T, D). `cap` is a soft cap on the scores, which the fused kernel does not support."""
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
    heads, n = query.shape[1:3]
    out = query.new_empty(n, heads, value.shape[-1])
    index = cast("int", module.layer_idx)
    for group in step.groups():
        keys, values = group.blocks.layer(index, key, value)
        _decode(group, query[0], key[0], value[0], keys, values, out, scaling, sliding_window, softcap)
    for segment in step.prefill:
        keys, values = segment.slot.blocks.layer(index, key, value)
        _prefill(step, segment, query[0], key[0], value[0], keys, values, out, scaling, sliding_window, softcap)
    return out[None], None


def _decode(group, query, key, value, keys, values, out, scale, window, cap) -> None:
    """Attention of all sequences of a group, with one new token each. Query heads that share keys are batched together
    (grouped-query attention), so keys are not repeated."""
    here, (heads, kv_heads) = slice(group.begin, group.end), (query.shape[0], key.shape[0])
    keys[group.slots, :, group.positions] = key[:, here].transpose(0, 1)
    values[group.slots, :, group.positions] = value[:, here].transpose(0, 1)
    low, high, longest, rows = group.low, group.high, group.longest, group.rows
    count = group.end - group.begin
    blocks = query[:, here].transpose(0, 1).reshape(count, kv_heads, heads // kv_heads, -1)
    first, mask = 0, None
    # A single sequence needs no mask: its slice of the cache ends at its own length.
    if group.whole:
        mask = group.mask(window, query.dtype)
        keys, values = keys.index_select(0, group.slots), values.index_select(0, group.slots)
    elif count == 1:
        first = max(0, longest - window) if window is not None else 0
    else:
        mask = group.mask(window, query.dtype)
        if rows is not None:
            # The product covers the whole span of slots; those that do not decode get zero queries.
            blocks = blocks.new_zeros(high - low, *blocks.shape[1:]).index_copy_(0, rows, blocks)
    answer = _attend(blocks, keys[low:high, :, first:longest], values[low:high, :, first:longest], mask, scale, cap)
    if rows is not None:
        answer = answer[rows]
    out[here] = answer.reshape(count, heads, -1)


def _prefill(step, segment, query, key, value, keys, values, out, scale, window, cap) -> None:
    """Attention of a chunk of one prompt, after those of its tokens that are in the cache already."""
    slot, start, count, past = segment.slot.index, segment.start, segment.count, segment.past
    here, end = slice(start, start + count), past + count
    keys[slot, :, past:end] = key[:, here]
    values[slot, :, past:end] = value[:, here]
    groups = query.shape[0] // key.shape[0]
    k, v = keys[slot : slot + 1, :, :end], values[slot : slot + 1, :, :end]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    # A prompt from its beginning, without limits, can use the fused causal kernel, which needs no mask.
    plain = past == 0 and cap is None and (window is None or count <= window)
    how = {"is_causal": True} if plain else {}
    mask = None if plain else step.prefill_mask(segment, window, query.dtype)
    out[here] = _attend(query[None, :, here], k, v, mask, scale, cap, **how)[0].transpose(0, 1)


AttentionInterface.register(ATTENTION, slot_attention)
