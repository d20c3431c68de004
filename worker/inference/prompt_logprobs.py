"""Log-probabilities of the tokens of a prompt, and the likeliest next tokens at each position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from app.inference.protocol import Logprob, PromptLogprobs, SeenToken
from worker.inference.sampling import likeliest, token_bytes

if TYPE_CHECKING:
    from worker.inference.scheduler import Request

CHUNK = 32
"""Prompt tokens per step: each needs logits over the whole vocabulary, a megabyte where that is large."""


def look(running: Request, logits: torch.Tensor) -> PromptLogprobs | None:
    """Add the logits (count, V) of the tokens just read to `running.seen`; returns the result once all are read, else None."""
    prompt, lead = running.prompt, running.place.lane.lead
    if not running.seen:
        running.seen.append(_said(running, prompt[lead], None))
    logs, top = logits.log_softmax(-1), running.request.sampling.top_logprobs
    begin = running.read - len(logits)
    for i in range(max(begin, lead), min(running.read, len(prompt) - 1)):
        token, row = prompt[i + 1], logs[i - begin]
        running.seen.append(_said(running, token, float(row[token]), likeliest(running.place.tokenizer, row, top)))
    if running.read < len(prompt):
        return None
    values, ids = logs[-1].topk(min(running.request.look or 1, logs.shape[1]))
    following = [_said(running, i, v) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
    return PromptLogprobs(tokens=running.seen, following=following)


def _said(running: Request, token: int, logprob: float | None, top: Sequence[Logprob] = ()) -> SeenToken:
    raw = token_bytes(running.place.tokenizer, token)
    return SeenToken(id=token, token=raw.decode("utf-8", "replace"), bytes=list(raw), logprob=logprob, top=list(top))
