"""Whole greedy answers of the studio's model and of an exported file, next to each other.

A small divergence on average does not mean the same answers: where two tokens are almost equally likely, rounding takes the other one,
and the answer continues from there. So the answers themselves are compared, token by token.
"""

from __future__ import annotations

import statistics
from collections.abc import Container, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

PROMPTS = 8
TOKENS = 48
END = -1
"""Stands for whatever token ends an answer: which one it is makes no difference to a reader."""
QUESTIONS = (
    "What is the capital of France?",
    "How many days does a week have?",
    "What is 2 + 2?",
    "Who wrote Romeo and Juliet?",
    "Name three fruits.",
    "Why is the sky blue? Answer in one sentence.",
    "Translate “good morning” into French.",
    "Write a short sentence about the sea.",
)
"""What a model of conversations is asked when it has no held-out rows of its own."""


NEAR = 20
"""Tokens at each place of which it is known how much less likely they are than the first."""


class GreedyPrompt(NamedTuple):
    """What is asked, as a person reads it and as the model does, and the most tokens of the answer."""

    shown: str
    ids: list[int]
    most: int = TOKENS


class GreedyAnswer(NamedTuple):
    """A greedy answer: its tokens, with `END` last where it ended, and its text."""

    tokens: list[int]
    text: str
    behind: Sequence[dict[int, float]] = ()
    """For each token how much less likely the next ones were, in nats."""
    withheld: bool = False
    """Whether tokens of half a character follow, which llama.cpp does not give away."""


def prompts(tokenizer: Any, kind: str, asked: Sequence[str | list[dict[str, Any]]], longest: int) -> list[GreedyPrompt]:
    """The first of `asked` that can be rendered to at most `longest` tokens."""
    from app.errors import StudioError
    from worker.data.chat_template import render_prompt

    found: list[GreedyPrompt] = []
    for one in asked:
        try:
            _, ids = render_prompt(tokenizer, kind, one)
        except StudioError:
            continue
        if 0 < len(ids) <= longest and len(found) < PROMPTS:
            found.append(GreedyPrompt(one if isinstance(one, str) else str(one[-1].get("content") or ""), ids))
    return found


def greedy(model: Any, tokenizer: Any, asked: Sequence[GreedyPrompt], ends: Container[int]) -> list[GreedyAnswer]:
    """The likeliest token after each other, all prompts in one batch; no sampling setting of the model's own counts."""
    import torch

    if not asked:
        return []
    longest, most = max(len(one.ids) for one in asked), max(one.most for one in asked)
    mask = torch.tensor([[0] * (longest - len(one.ids)) + [1] * len(one.ids) for one in asked])
    step = torch.tensor([[0] * (longest - len(one.ids)) + one.ids for one in asked])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    past, written, behind = None, torch.empty(len(asked), 0, dtype=torch.long), []
    with torch.inference_mode():
        for _ in range(most):
            out = model(input_ids=step, attention_mask=mask, position_ids=positions, past_key_values=past, use_cache=True, logits_to_keep=1)
            likeliest = out.logits[:, -1].float().topk(min(NEAR, out.logits.shape[-1]))
            past, step = out.past_key_values, likeliest.indices[:, :1]
            written = torch.cat([written, step], 1)
            behind.append([_behind(*row, ends) for row in zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)])
            mask, positions = torch.cat([mask, mask.new_ones(len(asked), 1)], 1), positions[:, -1:] + 1
            if all(any(token in ends for token in row) for row in written.tolist()):
                break
    rows = zip(written.tolist(), zip(*behind, strict=True), asked, strict=True)
    return [answer(tokenizer, row[: one.most], ends)._replace(behind=near) for row, near, one in rows]


def _behind(tokens: Sequence[int], logits: Sequence[float], ends: Container[int]) -> dict[int, float]:
    found: dict[int, float] = {}
    for token, logit in zip(tokens, logits, strict=True):
        found.setdefault(END if token in ends else token, logits[0] - logit)
    return found


def answer(tokenizer: Any, tokens: Sequence[int], ends: Container[int]) -> GreedyAnswer:
    kept = list(takewhile(lambda token: token not in ends, tokens))
    text = tokenizer.decode(kept, skip_special_tokens=True)
    return GreedyAnswer([*kept, END] if len(kept) < len(tokens) else kept, text)


def heard(said: dict[str, Any], ends: Container[int]) -> GreedyAnswer:
    """An answer as llama.cpp gives it, whose tokens may hold the one that ended it."""
    kept = list(takewhile(lambda token: token not in ends, said["tokens"]))
    return GreedyAnswer([*kept, END] if said["ended"] else kept, said["text"], withheld=said["withheld"])


# The comparison -------------------------------------------------------------------------------------------------------


def beside(here: Sequence[GreedyAnswer], there: Sequence[GreedyAnswer]) -> list[dict[str, Any]]:
    """For each prompt the place of the first token that differs, from 0, the file's answer, and how much less likely its token was in the
    studio than the studio's own, in nats; all None where the answers are one."""
    return [_apart(*both) for both in zip(here, there, strict=True)]


def _apart(here: GreedyAnswer, there: GreedyAnswer) -> dict[str, Any]:
    mine = here.tokens[: len(there.tokens)] if there.withheld else here.tokens
    at = first_difference(mine, there.tokens)
    if at is None:
        return {"parts_at": None, "answer": None, "behind": None}
    near = here.behind[at] if at < len(here.behind) and at < len(there.tokens) else {}
    return {"parts_at": at, "answer": there.text, "behind": near.get(there.tokens[at]) if near else None}


def first_difference(a: Sequence[Any], b: Sequence[Any]) -> int | None:
    """The first place where two sequences differ; None where they are equal."""
    if list(a) == list(b):
        return None
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def verdict(compared: Sequence[dict[str, Any]]) -> str:
    """In words, for a file in which nothing is wrong."""
    apart = [one["parts_at"] for one in compared if one["parts_at"] is not None]
    if not compared:
        return "no answer was compared"
    if not apart:
        return "as the model"
    return f"answers part on {len(apart)} of {len(compared)} prompts, in the median at token {statistics.median_low(apart) + 1}"
