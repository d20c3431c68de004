"""Evaluation on validation rows: loss, token accuracy and perplexity, and generated answers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from transformers import GenerationMixin, PreTrainedModel

from app.strategies._model import decoder, transformer, wrapped
from worker.data import answer_form
from worker.data.batching import Batch, Row, Tokenised, make_batch
from worker.data.chat_template import render_prompt, sample_of
from worker.data.packing import best_fit
from worker.modeling import padded
from worker.modeling.cross_entropy import head_of, score
from worker.modeling.fused_layers import uncompiled
from worker.runtime import devices
from worker.runtime.device import Compute
from worker.runtime.progress import drained


class HeldOutPrompt(NamedTuple):
    """A prompt from a validation row: the text, its token ids, the reference answer, and the tools that the row offers."""

    text: str
    ids: list[int]
    reference: str
    tools: Sequence[dict[str, Any]] = ()


def plain_model(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model inside a peft wrapper, or the model itself."""
    return transformer(wrapped(model).get_base_model() if hasattr(model, "get_base_model") else model)


def hidden_states(model: torch.nn.Module, batch: Batch, engine: Compute) -> torch.Tensor:
    """The last hidden states of a pack at positions with a target, (K, H). The head is applied by `worker/modeling/cross_entropy.py`."""
    states: torch.Tensor = decoded(model, batch, engine).last_hidden_state
    return states[0].index_select(0, batch.sources)


def decoded(model: torch.nn.Module, batch: Batch, engine: Compute, **more: Any) -> Any:
    """What the decoder without its head gives for a pack, with further arguments of its call."""
    stack = decoder(plain_model(model))
    with engine.autocast():
        return stack(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **batch.arguments, **more)


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Within this context dropout is off and there are no gradients; the previous state is restored afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), uncompiled():
            yield
    finally:
        model.train(training)


def reading(
    model: torch.nn.Module, read: Callable[[list[int]], None], lengths: Sequence[int], budget: int, engine: Compute
) -> Generator[float, None, None]:
    """Call `read` with the numbers of all rows, of these lengths, packed to `budget` tokens at a time (on a CPU as several packs on
    parallel threads), with the model in evaluation mode. Before each call yields the fraction of the packs that is done."""
    parts = engine.parts(budget)
    packs = best_fit(range(len(lengths)), lengths, budget // parts)
    for start in range(0, len(packs), parts):
        yield start / len(packs)
        with evaluating(model):  # per pack, because the caller runs other code between two yields
            engine.abreast.map(read, packs[start : start + parts])


class RowScores(NamedTuple):
    """For each row: the sum of its losses in nats, its trained tokens, and how many of these were predicted right."""

    nats: list[float]
    tokens: list[int]
    hits: list[int]


def scoring(model: torch.nn.Module, data: Tokenised, budget: int, engine: Compute) -> Generator[float, None, RowScores]:
    """Score every row of `data` in packs; yields the fraction done before each pack, and returns the scores in the rows' order."""
    found = RowScores([0.0] * len(data), [0] * len(data), [0] * len(data))
    head = head_of(plain_model(model))

    def read(pack: Sequence[int]) -> None:
        batch = make_batch(data, pack, engine.device)
        counts = [int(data.trained[data.starts[r] : data.starts[r + 1]].sum()) for r in pack]
        losses, right = score(hidden_states(model, batch, engine), head, batch.targets, engine.compute)
        for row, nats, hits in zip(pack, losses.double().cpu().split(counts), right.cpu().split(counts), strict=True):
            found.nats[row], found.tokens[row], found.hits[row] = float(nats.sum()), len(nats), int(hits.sum())

    yield from reading(model, read, data.lengths, budget, engine)
    return found


def score_rows(
    model: torch.nn.Module, data: Tokenised, budget: int, engine: Compute, progress: Callable[[float], None] | None = None
) -> RowScores:
    """The same in one call. `progress` gets the fraction of the packs that is done."""
    return drained(scoring(model, data, budget, engine), progress)


def measures(scored: RowScores, trained_bytes: int = 0) -> dict[str, float]:
    """Loss in nats per token, token accuracy, perplexity and, where the number of bytes is given, bits per byte."""
    total, count = math.fsum(scored.nats), sum(scored.tokens)
    loss = total / count
    found = {"loss": loss, "token_accuracy": sum(scored.hits) / count, "perplexity": math.exp(min(loss, 700.0))}
    return found | ({"bits_per_byte": total / math.log(2) / trained_bytes} if trained_bytes else {})


def validate(model: torch.nn.Module, data: Tokenised, budget: int, engine: Compute) -> dict[str, float]:
    """Loss in nats per token, token accuracy and perplexity over all rows of `data`."""
    return measures(score_rows(model, data, budget, engine))


def questions(tokenizer: Any, rows: Sequence[Row], kind: str, count: int, longest: int) -> list[HeldOutPrompt]:
    """The first `count` validation rows as prompts. Prompts that leave no room for an answer are skipped."""
    found: list[HeldOutPrompt] = []
    for row in rows:
        if len(found) == count:
            break
        prompt, reference = sample_of(row.row, kind)
        if not prompt:
            continue
        tools = row.row.get("tools") or ()
        _, ids = render_prompt(tokenizer, kind, prompt, tools or None)
        if 0 < len(ids) <= longest:
            found.append(HeldOutPrompt(_as_asked(prompt), ids, reference, tools))
    return found


def _as_asked(prompt: str | list[dict[str, Any]]) -> str:
    """The text of a prompt: the text itself, or the last message of a conversation."""
    if isinstance(prompt, str):
        return prompt
    said = prompt[-1].get("content") or ""
    return said if isinstance(said, str) else "".join(part.get("text", "") for part in said)


def as_text(tokenizer: Any, asked: HeldOutPrompt, ids: list[int]) -> str:
    """The text of an answer, its calls of tools in one form where the prompt offers any."""
    if asked.tools:
        return answer_form.in_one_form(tokenizer, ids, asked.tools)
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return text.strip()


def written(
    model: torch.nn.Module,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    stops: Sequence[int],
    most: int,
    engine: Compute,
    seconds: float | None = None,
    seed: int | None = None,
) -> list[list[int]]:
    """Token ids that the model writes behind each prompt, all in one batch: at most `most`, with the one of `stops` that ends an answer. Each
    is the likeliest; with a `seed` it is drawn from the model's distribution as it is. After `seconds` all end where they are."""
    inner = plain_model(model)
    with _drawing(seed, engine), evaluating(model), engine.autocast():
        if padded.is_padded(inner):
            choose = _likeliest if seed is None else _drawn
            return padded.written(model, prompts, most, set(stops), choose, seconds)
        rows = _generated(model, tokenizer, prompts, stops, most, engine, seconds, seed is not None)
    return [row[: next((place + 1 for place, token in enumerate(row) if token in stops), len(row))] for row in rows]


@contextlib.contextmanager
def _drawing(seed: int | None, engine: Compute) -> Iterator[None]:
    """Within this context torch's generators begin at `seed`, and are afterwards what they were."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([engine.device] if devices.is_gpu(engine.device) else [], device_type=engine.device.type):
        torch.manual_seed(seed)
        yield


def _likeliest(logits: torch.Tensor) -> torch.Tensor:
    return logits.argmax()


def _drawn(logits: torch.Tensor) -> torch.Tensor:
    return torch.multinomial(logits.float().softmax(-1), 1)


def _generated(
    model: torch.nn.Module,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    stops: Sequence[int],
    most: int,
    engine: Compute,
    seconds: float | None,
    draws: bool,
) -> list[list[int]]:
    """What transformers' `generate` writes behind prompts padded on the left; what stands behind the end of an answer is padding."""
    inner, longest = plain_model(model), max(map(len, prompts))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=engine.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=engine.device)
    before = inner.config._attn_implementation
    inner.set_attn_implementation("sdpa")  # left padding needs a mask, which packed attention does not support
    # The last state of each row is a view; multiplying it by a frozen matrix would copy the matrix once per row.
    packing = inner.get_output_embeddings().register_forward_pre_hook(lambda _, given: (given[0].contiguous(), *given[1:]))
    how = {"temperature": 1.0, "top_p": 1.0, "top_k": 0} if draws else {"temperature": None, "top_p": None, "top_k": None}
    try:
        out = cast("GenerationMixin", model).generate(  # type: ignore[misc]  # its `self` is annotated for another checker
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=most,
            do_sample=draws,
            num_beams=1,
            pad_token_id=pad,
            eos_token_id=list(stops),
            use_cache=True,
            repetition_penalty=1.0,
            max_time=seconds,
            **how,
        )
    finally:
        packing.remove()
        inner.set_attn_implementation(before)
    rows: list[list[int]] = cast("torch.Tensor", out)[:, longest:].tolist()
    return rows
