"""Answers that a model draws while it is trained: several to each prompt, every token with its log-probability.

A prompt is read once for all of its answers, and all answers are written in one batch of the slots of `worker/modeling/kv_cache.py`: one
that ends leaves its slot to the next prompt, so that short answers do not wait for long ones. Tokens are drawn at temperature 1 from the
whole distribution, which is the one that a policy gradient is about.

Every answer has random numbers of its own, by its prompt and its place, so equal weights and an equal seed draw equal answers.
"""

from __future__ import annotations

import contextlib
import heapq
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from worker.modeling import padded
from worker.modeling.auto import width_of
from worker.modeling.draws import pick_each
from worker.modeling.kv_cache import ATTENTION, Blocks, ForwardPass, Segment, reads_slots, running
from worker.runtime import devices
from worker.runtime.device import Compute
from worker.runtime.failures import Diverged
from worker.runtime.transfer import sent
from worker.scoring.held_out import evaluating, plain_model, written

AT_ONCE, GPU_AT_ONCE = 64, 256
"""Answers that are written at once."""
HURRIED_AT_ONCE = 32
"""The same where time may run out: some are finished by then."""
CACHE_BYTES, GPU_CACHE_BYTES = 1 << 30, 4 << 30
"""Keys and values of all of them; longer answers are written fewer at once."""
READ_TOKENS = 2048
"""Tokens of prompts that are read in one pass, beside those that are written."""
PADDED_AT_ONCE = 16


class DrawnAnswer(NamedTuple):
    """One answer: its tokens, the one that ended it included; minus the log-probability of each in nats, or none where it is not known;
    and whether a stop token ended it rather than the limit."""

    ids: list[int]
    nats: list[float]
    ended: bool


@dataclass(eq=False)
class _Written:
    """An answer that is being written."""

    prompt: int
    member: int
    segment: Segment
    numbers: torch.Tensor | None  # (most,) float64, one for each token; None where the likeliest is taken
    ids: list[int] = field(default_factory=list)
    nats: list[float] = field(default_factory=list)


class DrawOrder(NamedTuple):
    """`per_prompt` answers of at most `most` tokens to each of `prompts` (token ids, virtual tokens included); the tokens of `stops` end one."""

    prompts: Sequence[list[int]]
    per_prompt: int
    most: int
    stops: frozenset[int]
    seed: int | None  # None: the likeliest tokens
    until: float | None = None  # of `time.monotonic`: answers that are not finished by then are left out

    def late(self) -> bool:
        return self.until is not None and time.monotonic() >= self.until


Drawing = Callable[[torch.nn.Module, Any, DrawOrder, Compute], Generator[float, None, list[list[DrawnAnswer]]]]


def drawing(model: torch.nn.Module, tokenizer: Any, order: DrawOrder, engine: Compute) -> Generator[float, None, list[list[DrawnAnswer]]]:
    """The answers by prompt; yields the share that is done. Raises Diverged where the model's logits are not finite."""
    inner = plain_model(model)
    batched = reads_slots(inner) and not getattr(inner.config, "use_bidirectional_attention", False) and not padded.is_padded(inner)
    found = yield from _in_slots(model, order, engine) if batched else _padded(model, tokenizer, order, engine)
    engine.meter.add(sum(map(len, order.prompts)), sum(len(answer.ids) for answers in found for answer in answers))
    return found


def _numbers(order: DrawOrder, prompt: int, member: int) -> torch.Tensor | None:
    if order.seed is None:
        return None
    generator = torch.Generator().manual_seed((order.seed * 1_000_003 + prompt * 1009 + member) % 2**63)
    return torch.rand(order.most, generator=generator, dtype=torch.float64)


def _capacity(model: torch.nn.Module, size: int, order: DrawOrder, engine: Compute) -> int:
    """Answers at once: at least those of one prompt."""
    config = plain_model(model).config.get_text_config()
    heads = width_of(config, "num_key_value_heads") or config.num_attention_heads
    width = width_of(config, "head_dim") or config.hidden_size // config.num_attention_heads
    each = 2 * config.num_hidden_layers * heads * width * size * (2 if engine.precision != "fp32" else 4)
    most, room = (GPU_AT_ONCE, GPU_CACHE_BYTES) if devices.is_gpu(engine.device) else (AT_ONCE, CACHE_BYTES)
    hurried = most if order.until is None else HURRIED_AT_ONCE
    return max(order.per_prompt, min(most, hurried, room // each))


def _in_slots(model: torch.nn.Module, order: DrawOrder, engine: Compute) -> Generator[float, None, list[list[DrawnAnswer]]]:
    prompts, count = order.prompts, order.per_prompt
    size, whole = max(map(len, prompts)) + order.most, count * len(prompts)
    blocks = Blocks(size)
    blocks.grow(min(_capacity(model, size, order, engine), whole))
    free, waiting = list(range(len(blocks.slots))), deque(range(len(prompts)))
    found: dict[tuple[int, int], DrawnAnswer] = {}
    active: list[_Written] = []
    while (active or waiting) and not order.late():
        yield len(found) / whole
        with _by_slots(model), evaluating(model), engine.autocast():  # for one pass, because the caller runs other code between two yields
            active = _step(model, blocks, active, _begin(blocks, free, waiting, order), prompts, engine)
        for one in active:
            ended = one.ids[-1] in order.stops
            if ended or len(one.ids) == order.most:
                found[one.prompt, one.member] = DrawnAnswer(one.ids, one.nats, ended)
                heapq.heappush(free, one.segment.slot.index)
        active = [one for one in active if (one.prompt, one.member) not in found]
    return [[found[prompt, member] for member in range(count) if (prompt, member) in found] for prompt in range(len(prompts))]


def _begin(blocks: Blocks, free: list[int], waiting: deque[int], order: DrawOrder) -> list[list[_Written]]:
    """The answers to the next prompts for which there are slots, those of one prompt together."""
    found: list[list[_Written]] = []
    tokens = 0
    while waiting and len(free) >= order.per_prompt and (not found or tokens + len(order.prompts[waiting[0]]) <= READ_TOKENS):
        prompt = waiting.popleft()
        past = len(order.prompts[prompt])
        tokens += past
        slots = [blocks.slots[heapq.heappop(free)] for _ in range(order.per_prompt)]
        found.append([_Written(prompt, i, Segment(slot, 0, 1, past), _numbers(order, prompt, i)) for i, slot in enumerate(slots)])
    return found


def _step(
    model: torch.nn.Module,
    blocks: Blocks,
    active: list[_Written],
    began: list[list[_Written]],
    prompts: Sequence[list[int]],
    engine: Compute,
) -> list[_Written]:
    """One pass: a token of each answer that is being written, and the whole prompts of those that begin."""
    active = sorted(active, key=lambda one: one.segment.slot.index)
    ids = [one.ids[-1] for one in active]
    decode = [Segment(one.segment.slot, place, 1, len(prompts[one.prompt]) + len(one.ids) - 1) for place, one in enumerate(active)]
    positions, last, prefill = [segment.past for segment in decode], list(range(len(active))), []
    for group in began:
        text = prompts[group[0].prompt]
        prefill.append(Segment(group[0].segment.slot, len(ids), len(text), 0))
        ids += text
        positions += range(len(text))
        last.append(len(ids) - 1)
    flat, at, kept = (sent(torch.tensor(numbers), engine.device) for numbers in ([ids], [positions], last))
    with running(ForwardPass(decode, prefill, engine.device)):
        logits = plain_model(model)(input_ids=flat, position_ids=at, use_cache=False, logits_to_keep=kept).logits[0].float()
    for group in began:
        _copy(blocks, [one.segment.slot.index for one in group], len(prompts[group[0].prompt]))
    rows = [*range(len(active)), *(len(active) + place for place, group in enumerate(began) for _ in group)]
    writing = [*active, *(one for group in began for one in group)]
    _draw(logits.index_select(0, sent(torch.tensor(rows), engine.device)) if began else logits, writing)
    return writing


def _copy(blocks: Blocks, slots: Sequence[int], count: int) -> None:
    """Copy the first `count` tokens of the first slot to the others."""
    for pair in blocks.layers.values():
        for tensor in pair:
            tensor[slots[1:], :, :count] = tensor[slots[0], :, :count]


def _draw(logits: torch.Tensor, writing: Sequence[_Written]) -> None:
    """Draw the next token of each answer from its row of logits (N, V)."""
    logs = logits.log_softmax(1)
    numbers = [one.numbers[len(one.ids)] for one in writing if one.numbers is not None]
    tokens = pick_each(logs.exp(), sent(torch.stack(numbers), logits.device)) if numbers else logs.argmax(1)
    nats = -logs.gather(1, tokens[:, None])[:, 0]
    told = torch.stack([tokens.double(), nats.double()]).cpu()
    if not bool(told.isfinite().all()):
        raise Diverged("The model's logits are not finite numbers, so no answer can be drawn.", hint="Lower the learning rate.")
    for one, token, value in zip(writing, told[0].long().tolist(), told[1].tolist(), strict=True):
        one.ids.append(token)
        one.nats.append(value)


@contextlib.contextmanager
def _by_slots(model: torch.nn.Module) -> Iterator[None]:
    """Within this context the model's attention reads from the slots."""
    inner = plain_model(model)
    before = inner.config._attn_implementation
    inner.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        inner.set_attn_implementation(before)


def _padded(model: torch.nn.Module, tokenizer: Any, order: DrawOrder, engine: Compute) -> Generator[float, None, list[list[DrawnAnswer]]]:
    """The same for a model that does not read from slots: in padded batches, whose log-probabilities are not known."""
    asked = [prompt for prompt in order.prompts for _ in range(order.per_prompt)]
    told: list[DrawnAnswer] = []
    for start in range(0, len(asked), PADDED_AT_ONCE):
        yield start / len(asked)
        batch = asked[start : start + PADDED_AT_ONCE]
        seed = None if order.seed is None else (order.seed * 1_000_003 + start) % 2**63
        seconds = None if order.until is None else max(order.until - time.monotonic(), 0.0)
        found = written(model, tokenizer, batch, list(order.stops), order.most, engine, seconds, seed)
        if order.late():
            break  # these were cut short
        told += [DrawnAnswer(ids, [], bool(ids) and ids[-1] in order.stops) for ids in found]
    return [told[at : at + order.per_prompt] for at in range(0, len(asked), order.per_prompt)]
