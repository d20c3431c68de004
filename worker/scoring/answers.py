"""The likeliest answers of a model to held-out rows, as texts."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from typing import Any

import torch

from worker.data.chat_template import stop_ids
from worker.runtime.device import Compute
from worker.runtime.progress import drained
from worker.scoring.held_out import HeldOutPrompt, as_text, plain_model
from worker.scoring.sampler import DrawOrder, drawing


def answers(
    model: torch.nn.Module, tokenizer: Any, asked: Sequence[HeldOutPrompt], most: int, engine: Compute, lead: Sequence[int] = ()
) -> list[str]:
    """Greedy answers to all questions, of at most `most` tokens each. `lead` are the virtual tokens of a soft prompt."""
    return [text for text in answers_within(None, model, tokenizer, asked, most, engine, lead) if text is not None]


def answers_within(
    seconds: float | None,
    model: torch.nn.Module,
    tokenizer: Any,
    asked: Sequence[HeldOutPrompt],
    most: int,
    engine: Compute,
    lead: Sequence[int] = (),
) -> list[str | None]:
    """The same within `seconds`. None for an answer that did not finish in time: it says nothing about the model."""
    return drained(answering(seconds, model, tokenizer, asked, most, engine, lead))


def answering(
    seconds: float | None,
    model: torch.nn.Module,
    tokenizer: Any,
    asked: Sequence[HeldOutPrompt],
    most: int,
    engine: Compute,
    lead: Sequence[int] = (),
) -> Generator[float, None, list[str | None]]:
    """The same, the shortest prompts first; yields the share that is done."""
    if not asked:
        return []
    until = None if seconds is None else time.monotonic() + seconds
    order = sorted(range(len(asked)), key=lambda place: len(asked[place].ids))
    stops = frozenset(stop_ids(tokenizer, plain_model(model).generation_config))
    prompts = [[*lead, *asked[place].ids] for place in order]
    drawn = yield from drawing(model, tokenizer, DrawOrder(prompts, 1, most, stops, None, until), engine)
    told: list[str | None] = [None] * len(asked)
    for place, found in zip(order, drawn, strict=True):
        for one in found:
            told[place] = as_text(tokenizer, asked[place], [i for i in one.ids if i not in stops])
    return told
