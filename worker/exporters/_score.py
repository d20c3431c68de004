"""The score of the task in the studio and from an exported file, on the same held-out rows.

The metric is that of the evaluation at the end of a job: loss, in nats per token of the answer; or accuracy where every answer is one of
a few labels, which the model writes out. The difference has a 95% interval over the rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from worker.exporters._answers import GreedyPrompt

ROWS, PLACES = 24, 8
"""Rows whose loss is measured, and tokens of each answer: all of a short one, evenly spread over a longer one."""
LABELED_ROWS = 64
MAX_LABELS, LABEL_CHARACTERS = 20, 40
WORSE = 0.01
"""A type keeps the score when it is worse by at most a hundredth: of the loss, the upper end of the interval; of the accuracy, the value
itself, with no difference inside the interval, which is wide on so few rows."""


class Scored(NamedTuple):
    """A held-out row: its tokens, and the places in them of those whose loss is measured."""

    ids: list[int]
    places: list[int]


class Task(NamedTuple):
    """What is measured on both sides: losses on rows, or answers to prompts of which each has one right label."""

    rows: list[Scored]
    prompts: list[GreedyPrompt]
    labels: list[str]


class TaskScores(NamedTuple):
    """What one side made of a task: the losses at the places of each row, the answers to the prompts."""

    losses: Sequence[Sequence[float]]
    answers: Sequence[str]


def task(tokenizer: Any, kind: str, rows: Sequence[dict[str, Any]], longest: int) -> Task:
    """The task that held-out rows pose. Rows that cannot be rendered, or are longer than `longest` tokens, are left away."""
    from app.errors import StudioError
    from worker.data.chat_template import render_prompt, render_row, sample_of

    scored: list[Scored] = []
    named: list[tuple[GreedyPrompt, str]] = []
    labels = labels_of(rows, kind)
    for row in spread(rows, LABELED_ROWS if labels else ROWS):
        try:
            if labels:
                asked, label = sample_of(row, kind)
                _, ids = render_prompt(tokenizer, kind, asked)
                if 0 < len(ids) <= longest:
                    most = len(tokenizer(label, add_special_tokens=False).input_ids) + 2
                    named.append((GreedyPrompt("", ids, most), label.strip()))
                continue
            ids, trained, _ = render_row(tokenizer, row, kind, longest)
        except StudioError:
            continue
        if here := [place for place, learned in enumerate(trained) if learned and place > 0]:
            scored.append(Scored(ids, spread(here, PLACES)))
    return Task(scored, [prompt for prompt, _ in named], [label for _, label in named])


def labels_of(rows: Sequence[dict[str, Any]], kind: str) -> set[str]:
    """The few short answers that all rows have among them, each several times; none where answers are texts."""
    from worker.data.chat_template import sample_of

    if not all("messages" in row or "prompt" in row for row in rows):
        return set()
    found = {sample_of(row, kind)[1].strip() for row in rows}
    few = len(found) <= min(MAX_LABELS, len(rows) // 3) and all(0 < len(label) <= LABEL_CHARACTERS for label in found)
    return found if few else set()


def spread(values: Sequence[Any], most: int) -> list[Any]:
    """At most so many of them, evenly spread over all."""
    count = min(most, len(values))
    return [values[i * len(values) // count] for i in range(count)]


def nats(model: Any, rows: Sequence[Scored]) -> list[list[float]]:
    """The losses of a model at the places of each row, in nats."""
    import torch

    found = []
    with torch.inference_mode():
        for row in rows:
            logits = model(torch.tensor([row.ids])).logits[0][-len(row.ids) :]
            at = torch.tensor(row.places)
            losses = torch.nn.functional.cross_entropy(logits[at - 1].float(), torch.tensor(row.ids)[at], reduction="none")
            found.append(losses.tolist())
    return found


# The comparison -------------------------------------------------------------------------------------------------------


def compared(task: Task, here: TaskScores, there: TaskScores) -> dict[str, Any] | None:
    """The score on both sides; None where nothing was measured, or a file computes no numbers."""
    from worker.scoring import metrics

    if task.labels:
        right = [np.array([said.strip() == label for said, label in zip(side.answers, task.labels, strict=True)]) for side in (here, there)]
        return _line("accuracy", metrics.paired_hits(*right))
    losses = [loss for side in (here, there) for row in side.losses for loss in row]
    if not losses or not all(loss is not None and math.isfinite(loss) for loss in losses):
        return None
    one, other = ([sum(row) / len(row) for row in side.losses] for side in (here, there))
    return _line("loss", metrics.paired_losses(one, other, [len(row) for row in here.losses]))


def _line(metric: str, paired: dict[str, Any]) -> dict[str, Any]:
    low, high = paired["interval"]
    one, other = paired["one"], paired["other"]
    known = math.isfinite(low) and math.isfinite(high)
    kept = known and (high <= WORSE * one if metric == "loss" else one - other <= WORSE and low <= 0 <= high)
    return {
        "metric": metric, "rows": paired["rows"], "here": one, "there": other, "interval": [low, high] if known else None, "kept": kept,
    }  # fmt: skip
