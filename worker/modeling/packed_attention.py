"""Attention over packed sequences: sequences do not see each other, and no time is spent on masks or padding.

Registered with transformers as `luthier_packed`, so every decoder that uses its attention interface gets it. The model is called
with one row of T tokens, position ids that restart at 0 in each sequence, and the sequence lengths. transformers builds no mask
for a name it has no mask function for, so there is never a T × T mask.

On a CUDA device `torch.nn.attention.varlen` takes all sequences in one call; it has no dropout, so an encoder's attention weights
are not dropped there, while its hidden states are. A CPU with AMX takes them in one call too (`worker/kernels/cpu/attention.py`).
Elsewhere each sequence is one call: on two cores that is as fast as padding the sequences to one batch, and wastes no memory.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from app.models.integrity import BadModel
from worker.kernels.cpu import attention as amx_attention
from worker.runtime import devices
from worker.runtime.transfer import sent

NAME = "luthier_packed"

_AMX = hasattr(torch.cpu, "_is_amx_tile_supported") and torch.cpu._is_amx_tile_supported()
SHORT = 256 if _AMX else 2**30
"""On a CPU, bf16 attention over fewer tokens than this is computed in float32, which is faster and rounds less. Measured per
sequence and layer, forward and backward: without AMX 0.6 instead of 1.6 ms at 75 tokens (8 heads of 32), 5.5 instead of 6.5 ms at
200 (9 of 64); with AMX 0.4 instead of 1.4 ms at 75 and 1.7 instead of 2.6 ms at 200 (8 of 32), 3.1 instead of 3.2 ms at 200, but
17.8 instead of 10.7 ms at 512 (9 of 64)."""

try:
    from torch.nn.attention.varlen import varlen_attn as varlen_attn

    _GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
except ImportError:  # torch before 2.10
    varlen_attn = None  # type: ignore[assignment]  # whoever calls it looks first
    _GROUPED = {}

_repeats = not _GROUPED
"""Whether keys and values are repeated for each head of the queries, so that all have equally many."""


def probe_grouped_heads(device: torch.device) -> bool:
    """Where torch's attention has no argument for grouped heads (before 2.12), find out once whether it takes them all the same, as its
    kernel does: copies of keys and values cost 3 % of a step. Returns whether it does."""
    global _repeats
    if not _repeats or varlen_attn is None:
        return not _repeats
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(32, heads, 32, generator=generator).to(device, torch.bfloat16).requires_grad_() for heads in (4, 2, 2))
    ends = torch.tensor([0, 12, 32], dtype=torch.int32, device=device)
    repeated = [x.repeat_interleave(2, dim=1) for x in (k, v)]

    def gradients(keys: torch.Tensor, values: torch.Tensor) -> Any:
        out = varlen_attn(q, keys, values, ends, ends, max_q=20, max_k=20, window_size=(-1, 0))
        return torch.autograd.grad(cast("torch.Tensor", out).float().square().sum(), (q, k, v))

    try:
        pairs = zip(gradients(k, v), gradients(*repeated), strict=True)
        _repeats = not all(torch.allclose(x.float(), y.float(), rtol=0.05, atol=0.05) for x, y in pairs)
    except (RuntimeError, ValueError):  # it refuses them
        return False
    return not _repeats


MULTIPLE = 32
"""On a CPU packs are padded to a multiple of this many tokens. oneDNN caches up to 1,024 primitives by shape: steps whose packs
all differed in length took 13 MB more each, and an eighth of the time to create them."""


def filling(tokens: int, device: torch.device) -> list[int]:
    """Lengths of the padding of a pack of `tokens`, as a sequence of its own; empty on a GPU, where packs have a `PackShape`."""
    return [-tokens % MULTIPLE] if device.type == "cpu" and tokens % MULTIPLE else []


class PackShape(NamedTuple):
    """What all packs of a job have in common on a GPU, so that a compiled layer sees one shape and is compiled once."""

    tokens: int  # T: packs are padded to it
    sequences: int  # capacity of the table of sequence ends, padding included
    longest: int  # no sequence, and no piece of padding, is longer

    def max_sequences(self) -> int:
        """Sequences that a pack may hold in addition to its padding."""
        return self.sequences - math.ceil(self.tokens / self.longest)

    def filling(self, lengths: Sequence[int]) -> list[int]:
        """Lengths of the pieces that pad a pack of sequences of these lengths: each as long as the longest of them, or longer where
        the table has no more places. One piece longer than `longest` would make the attention read outside its table, which gave NaN
        losses."""
        left, free = self.tokens - sum(lengths), max(1, self.sequences - len(lengths))
        piece = max(*lengths, -(-left // free))
        return [piece] * (left // piece) + ([left % piece] if left % piece else [])


def frame_of(lengths: Sequence[int], budget: int, per_row: int = 1) -> PackShape:
    """The shape for packs of up to `budget` tokens of rows with these lengths, `per_row` sequences each; it has room for twice as many
    sequences as are usual."""
    longest = -(-max(lengths) // 64) * 64
    tokens = -(-max(budget, longest) // 64) * 64
    usual = tokens * len(lengths) / max(sum(lengths), 1)
    places = (math.ceil(2 * usual) + 16) * per_row + math.ceil(tokens / longest)
    return PackShape(tokens, min(places, tokens), longest)


def frames_of(lengths: Sequence[int], budget: int, per_row: int = 1) -> list[PackShape]:
    """The shapes of a job's packs, the smallest first: one for rows that fit into the budget and, where some are longer, one for those, each
    of which is a pack of its own. With a single shape every pack would be padded to the longest row."""
    room = -(-budget // 64) * 64  # a row between the budget and this has a pack of its own too, which fits into the first shape
    short, long = [n for n in lengths if n <= room], [n for n in lengths if n > room]
    return [frame_of(some, size, per_row) for some, size in ((short, budget), (long, max(long, default=0))) if some]


def frame_for(frames: Sequence[PackShape], tokens: int) -> PackShape | None:
    """The smallest shape that holds a pack of `tokens`; None without frames."""
    return next((frame for frame in frames if frame.tokens >= tokens), None)


def packed_arguments(lengths: list[int], device: torch.device, frame: PackShape | None = None) -> dict[str, Any]:
    """Arguments of the model's call in addition to ids and positions. `cu_seq_lens` are the cumulative sequence lengths, int32,
    beginning with 0; with a `frame` it is padded by repeating the last end, as sequences of length 0."""
    if not devices.is_gpu(device) and frame is None:
        return {"sequence_lengths": lengths}
    places = frame.sequences if frame else len(lengths)
    if len(lengths) > places:
        raise ValueError(f"{len(lengths)} sequences in a pack with {places} places")
    ends = torch.full((places + 1,), sum(lengths), dtype=torch.int32)
    ends[0] = 0
    ends[1 : len(lengths) + 1] = torch.tensor(lengths).cumsum(0)
    found = {"cu_seq_lens": sent(ends, device), "longest": as_size(max(lengths)) if frame else max(lengths)}
    return found if frame else {**found, "sequence_lengths": lengths}


def as_size(number: int) -> torch.Tensor:
    """A number as the size of an empty tensor on the host, which a compiled layer takes whatever it is; it would be compiled again for
    each number as such. FlashAttention launches a block for every 128 tokens of the longest sequence, for every place of the table: with
    the longest row of a job in the place of the pack's own, 98 % of them had nothing to do in short chats with one row of 4,096."""
    empty = torch.empty(number, 0)
    torch._dynamo.maybe_mark_dynamic(empty, 0)
    return empty


def packed(ids: Sequence[int] | np.ndarray, lengths: Sequence[int], device: torch.device, frame: PackShape | None = None) -> dict[str, Any]:
    """Arguments of a model's call for concatenated texts of `lengths` tokens each: ids (1, T), position ids, and those of
    `packed_arguments`. T is padded to `frame`, or on a CPU by `filling`."""
    all_lengths = [*lengths, *(frame.filling(lengths) if frame else filling(len(ids), device))]
    flat = np.zeros(sum(all_lengths), np.int64)
    flat[: len(ids)] = ids
    places = np.concatenate([np.arange(n) for n in all_lengths])
    tensors = {"input_ids": flat, "position_ids": places}
    return {name: sent(torch.from_numpy(x)[None], device) for name, x in tensors.items()} | packed_arguments(all_lengths, device, frame)


class Branches(NamedTuple):
    """Answers behind the prompts of a pack, each of which attends to its prompt and to itself (`worker/data/shared_prompts.py`)."""

    counts: list[int]  # answers of each prompt
    longest: int  # tokens of the longest answer
    padded: torch.Tensor  # (answers × longest,) the answers' token at each place of a batch padded on the right; 0 at padding
    real: torch.Tensor  # (tokens of answers,) the place of each of them there


IGNORED = frozenset(
    {
        "position_ids", "use_cache", "cache_position", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict",
        "deterministic",
    }
)  # fmt: skip
"""Arguments that models pass to every attention and that do not change its result: positions are already in the rotated queries and
keys, nothing is cached, and `deterministic` chooses how flash attention adds up its gradients."""


def _unsupported(module: torch.nn.Module, why: str) -> BadModel:
    return BadModel(
        f"{type(module).__name__} cannot be computed over packed rows: {why}, which the packed attention does not support.",
        hint="Choose a model of another family, such as Llama, Qwen or Gemma 3.",
    )


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
    longest: int | torch.Tensor | None = None,
    branches: Branches | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within each packed sequence, for queries (1, heads, T, D) and keys and values (1, kv heads, T, D). Returns (1, T,
    heads, D). With `branches`, `sequence_lengths` are those of the prompts and of their padding, and answers stand behind them.

    Raises BadModel for an unknown argument, such as the attention sinks of gpt-oss: without it the model would compute something
    else. The same for soft-capped scores on packs of one shape, whose sequences the fallback does not separate.
    """
    if unknown := sorted(name for name, value in rest.items() if value is not None and name not in IGNORED):
        raise _unsupported(module, f"its attention takes {', '.join(unknown)}")
    if softcap is not None and cu_seq_lens is not None and sequence_lengths is None:
        raise _unsupported(module, "its attention soft-caps the scores")
    causal = getattr(module, "is_causal", True)
    if branches is not None:
        how = {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window, "softcap": softcap}
        return _branched(module, (query, key, value), sequence_lengths or [], branches, how), None
    kind = query.device.type
    if cu_seq_lens is not None and torch.is_autocast_enabled(kind):
        # A float32 embedding makes the rotary tables float32, and with them the rotated queries and keys.
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    # Only GPUs with bf16 have this kernel; those that run in fp16 do not.
    fits = query.dtype == torch.bfloat16 and softcap is None and query.shape[-1] <= 256 and query.shape[-1] % 8 == 0
    if varlen_attn is not None and cu_seq_lens is not None and longest is not None and fits:
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        v = v.contiguous()  # a view of a joint q, k, v product would keep all three alive until the backward pass
        if _repeats and k.shape[1] != q.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        back = (sliding_window or 0) - 1  # -1: unlimited
        window = (back, 0 if causal else back)
        longest = longest if isinstance(longest, int) else longest.shape[0]
        ends = cu_seq_lens, cu_seq_lens, longest, longest
        out: torch.Tensor = varlen_attn(q, k, v, *ends, scale=scaling, window_size=window, **_GROUPED)  # type: ignore[assignment]
        return out.unsqueeze(0), None  # without `return_aux` it returns no tuple
    if sequence_lengths is None and cu_seq_lens is not None:
        sequence_lengths = [n for n in cu_seq_lens.diff().tolist() if n]  # synchronizes: float32 and odd heads only
    lengths = sequence_lengths or [query.shape[2]]
    given = query.dtype
    value = value.contiguous()  # as above
    if devices.is_gpu(query.device) and key.shape[1] != query.shape[1]:
        # In float32, and in fp16 before Ampere, the one kernel that does not write all scores out takes no grouped heads.
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    # Under autocast rotated queries and keys may already be float32 while values are not.
    halves = query.device.type == "cpu" and torch.bfloat16 in (given, key.dtype, value.dtype)
    plain = not dropout and softcap is None and not torch.compiler.is_compiling()
    if halves and plain and amx_attention.supports(query, key):
        rules = amx_attention.Rules(scaling if scaling is not None else query.shape[-1] ** -0.5, causal, sliding_window or 0)
        q, k, v = (x.to(torch.bfloat16) for x in (query, key, value))
        out = amx_attention.attention(q, k, v, lengths, rules)
        return (out if torch.is_autocast_enabled("cpu") else out.to(given)), None
    with torch.autocast("cpu", enabled=False) if halves else contextlib.nullcontext():
        if halves and max(lengths) < SHORT:  # converted at once: a few long copies instead of many short ones
            query, key, value = query.float(), key.float(), value.float()
        # `split` rather than slices: its backward pass concatenates the pieces once, a slice's fills a whole (T, D) per sequence.
        pieces = []
        for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True):
            if halves:
                q, k, v = (x.to(torch.float32 if x.shape[2] < SHORT else torch.bfloat16) for x in (q, k, v))
            pieces.append(_one(q, k, v, scaling, dropout, causal, sliding_window, softcap).transpose(1, 2))
    return torch.cat(pieces, 1).to(given), None


def _branched(
    module: torch.nn.Module,
    given: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    prompts: list[int],
    branches: Branches,
    how: dict[str, Any],
) -> torch.Tensor:
    """Prompts as packed sequences, and the answers to each of them as one batch padded on the right, whose keys begin with those of their
    prompt. No token of an answer sees the padding, which has no gradient."""
    start, halves = sum(prompts), any(x.dtype == torch.bfloat16 for x in given)
    fronts, backs = zip(*(x.split([start, x.shape[2] - start], 2) for x in given), strict=True)
    query, key, value = fronts
    first, _ = packed_attention(module, query, key, value, None, sequence_lengths=prompts, **how)
    # (answers, heads, longest, D)
    queries, keys, values = (x[0].index_select(1, branches.padded).unflatten(1, (-1, branches.longest)).transpose(0, 1) for x in backs)
    causal, after, found = getattr(module, "is_causal", True), 0, []
    with torch.autocast(first.device.type, enabled=False) if halves else contextlib.nullcontext():
        for count, k, v in zip(branches.counts, *(x.split(prompts, 2) for x in fronts[1:]), strict=False):  # the last piece may be padding
            rows, after = slice(after, after + count), after + count
            wide = torch.float32 if k.shape[2] + branches.longest < SHORT else torch.bfloat16
            parts = queries[rows], *(torch.cat([x.expand(count, -1, -1, -1), y[rows]], 2) for x, y in ((k, keys), (v, values)))
            q, k, v = (x.to(wide) for x in parts) if halves else parts
            found.append(_one(q, k, v, how["scaling"], how["dropout"], causal, how["sliding_window"], how["softcap"]))
    second = torch.cat(found).transpose(1, 2).flatten(0, 1).index_select(0, branches.real)
    return torch.cat([first, second[None].to(first.dtype)], 1)


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
    """The last L positions of sequences of K tokens, (sequences, heads, L, D). A mask is built only where L is less than K, for a window, or for
    a soft cap."""
    length, grouped = q.shape[2], q.shape[1] != k.shape[1]
    if softcap is None and length == k.shape[2] and (window is None or length <= window):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped)
    places = torch.arange(k.shape[2], device=q.device)
    seen = places[-length:, None] - places[None, :]  # distance from query to key
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


# Models that need something more, or cannot be packed ------------------------------------------------------------------

_PLAIN_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})


def packs(model: torch.nn.Module) -> bool:
    """Whether all layers of a model mix tokens only through the attention registered here. One that computes attention itself, or
    has convolutions or recurrent layers, would mix the sequences of a pack."""
    kinds = getattr(model.config, "layer_types", None) or ()
    return bool(getattr(type(model), "_supports_attention_backend", False)) and set(kinds) <= _PLAIN_LAYERS


def takes_branches(model: torch.nn.Module) -> bool:
    """Whether a model reads answers behind a prompt that they share: all layers mix tokens only through the attention here, over the whole
    text or a window of it."""
    config: Any = model.config
    kinds = set(getattr(config, "layer_types", None) or ())
    return config._attn_implementation == NAME and packs(model) and kinds <= _PLAIN_LAYERS - {"chunked_attention"}


def count_from_padding(model: torch.nn.Module) -> None:
    """Make RoBERTa's embeddings take positions from 0, as every model here is given them; its own count from the padding index + 1."""
    for module in model.modules():
        if hasattr(module, "create_position_ids_from_input_ids") and hasattr(module, "padding_idx"):
            module.register_forward_pre_hook(_shift, with_kwargs=True)


def _shift(embeddings: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    given = kwargs.get("position_ids")
    return (args, kwargs) if given is None else (args, {**kwargs, "position_ids": given + embeddings.padding_idx + 1})
