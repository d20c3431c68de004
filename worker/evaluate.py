"""How good the model is on held-out rows: loss, token accuracy and perplexity, and answers to read."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from worker.batches import Batch, Row, Tokenised, make_batch
from worker.device import Engine
from worker.loss import head_of, score
from worker.pack import best_fit
from worker.prompts import render_prompt, sample_of, stop_ids


class Question(NamedTuple):
    """A held-out prompt: its text, its token ids and what a person answered."""

    text: str
    ids: list[int]
    reference: str


def plain_model(model: torch.nn.Module) -> torch.nn.Module:
    """The transformers model inside a peft wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def hidden_states(model: torch.nn.Module, batch: Batch, engine: Engine) -> torch.Tensor:
    """The last hidden states of a pack where the next token is learnt, (K, H). The head is left to `worker/loss.py`."""
    decoder = plain_model(model).get_decoder()
    with engine.autocast():
        out = decoder(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **batch.arguments)
    return out.last_hidden_state[0].index_select(0, batch.sources)


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Dropout off and no gradients, and everything as before afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def validate(model: torch.nn.Module, data: Tokenised, budget: int, engine: Engine) -> dict[str, float]:
    """Loss in nats per learnt token, token accuracy and perplexity over all rows of `data`."""
    total, hits, count = 0.0, 0, 0
    head = head_of(plain_model(model))
    with evaluating(model):
        for pack in best_fit(range(len(data)), data.lengths, budget):
            batch = make_batch(data, pack, engine.device)
            losses, right = score(hidden_states(model, batch, engine), head, batch.targets, engine.compute)
            total += float(losses.double().sum())
            hits += int(right.sum())
            count += batch.trained
    loss = total / count
    return {"loss": loss, "token_accuracy": hits / count, "perplexity": math.exp(min(loss, 700.0))}


def questions(tokenizer: Any, rows: Sequence[Row], kind: str, count: int, longest: int) -> list[Question]:
    """The first `count` held-out rows as prompts. Prompts that leave no room for an answer are passed over."""
    found: list[Question] = []
    for row in rows:
        if len(found) == count:
            break
        prompt, reference = sample_of(row.row, kind)
        if not prompt:
            continue
        text, ids = render_prompt(tokenizer, kind, prompt, row.row.get("tools"))
        if 0 < len(ids) <= longest:
            found.append(Question(text, ids, reference))
    return found


def answers(
    model: torch.nn.Module, tokenizer: Any, asked: Sequence[Question], most: int, engine: Engine, lead: Sequence[int] = ()
) -> list[str]:
    """The likeliest answer to each question, at most `most` tokens, all written side by side with cached keys and values.
    `lead` are the placeholders of a soft prompt."""
    if not asked:
        return []
    inner = plain_model(model)
    asked = [q._replace(ids=[*lead, *q.ids]) for q in asked]
    longest = max(len(q.ids) for q in asked)
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(q.ids)) + q.ids for q in asked], device=engine.device)
    mask = torch.tensor([[0] * (longest - len(q.ids)) + [1] * len(q.ids) for q in asked], device=engine.device)
    before = inner.config._attn_implementation
    inner.set_attn_implementation("sdpa")  # padding on the left needs a mask, which packed attention has not
    try:
        with evaluating(model), engine.autocast():
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=most,
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=pad,
                eos_token_id=stop_ids(tokenizer, inner.generation_config),
                use_cache=True,
            )
    finally:
        inner.set_attn_implementation(before)
    return [tokenizer.decode(row[longest:], skip_special_tokens=True).strip() for row in out]
