"""Baselines of the base model on a job's validation rows without fine-tuning: few-shot prompting, or nearest class means. A job's
verdict compares with them: fine-tuning has to beat a prompt, not only the zero-shot base.

Answers are compared by the loss of the reference: the base reads it after examples (few-shot, Brown et al. 2020,
arXiv:2005.14165), the fine-tuned model without. Labels are compared by accuracy: the base's text embeddings, with each label the
mean of its examples' (nearest class mean, Snell et al. 2017, arXiv:1703.05175).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from app.jobs.solved_examples import SolvedExample
from app.planning.duration import EXAMPLES_A_CLASS, SHOTS
from worker.data.batching import Row
from worker.data.chat_template import as_trained, sample_of

MAX_VECTOR_ROWS, MAX_VECTOR_EXAMPLES = 400, 800


def asked_of(rows: Sequence[Row], kind: str) -> list[tuple[int, SolvedExample]]:
    """(line, prompt with its answer) of every row that has both; plain texts have none."""
    found = [(row.line, SolvedExample(*sample_of(row.row, kind))) for row in rows if "text" not in as_trained(row.row)]
    return [(line, one) for line, one in found if one.prompt and one.reference.strip()]


def examples_of(training: Sequence[Row], kind: str, seed: int, count: int = SHOTS) -> list[SolvedExample]:
    """The shortest of some drawn training rows, so that they leave room for the question."""
    rows = [row for row in training if "text" not in as_trained(row.row)]
    drawn = rows if len(rows) <= 8 * count else random.Random(seed).sample(rows, 8 * count)
    found = [one for _, one in asked_of(sorted(drawn, key=lambda row: row.line), kind)]
    return sorted(found, key=lambda e: len(str(e.prompt)) + len(e.reference))[:count]


def last_answer(prompt: str | list[dict[str, Any]], reference: str) -> dict[str, Any]:
    """A row in which only the last answer has a loss."""
    if isinstance(prompt, str):
        return {"prompt": prompt, "completion": reference}
    return {
        "messages": [*({**m, "weight": 0} if m["role"] == "assistant" else m for m in prompt), {"role": "assistant", "content": reference}]
    }


def nearest_class(vectors: np.ndarray, truth: Sequence[int] | np.ndarray, asked: np.ndarray, labels: int) -> np.ndarray:
    """The label (rows,) whose class mean is nearest by cosine to each of `asked` (rows, H); `vectors` are the embedded examples."""
    centers = class_means(_unit(vectors), truth, labels)
    return (_unit(asked) @ centers.T).argmax(1)


def class_means(vectors: np.ndarray, truth: Sequence[int] | np.ndarray, labels: int) -> np.ndarray:
    """The mean vector of each label, at length 1; −1 in every component for a label without examples, far from any embedding."""
    centers = np.full((labels, vectors.shape[1] if len(vectors) else 1), -1.0, np.float32)
    for label in range(labels):
        mine = vectors[[place for place, one in enumerate(truth) if one == label]]
        if len(mine):
            center = mine.mean(0)
            centers[label] = center / max(float(np.linalg.norm(center)), 1e-9)
    return centers


def a_few_of_each(truth: Sequence[int] | np.ndarray, seed: int) -> list[int]:
    """Indexes of up to `EXAMPLES_A_CLASS` rows of every label, and at most `MAX_VECTOR_EXAMPLES` in total."""
    order = list(range(len(truth)))
    seen: dict[int, int] = {}
    found = []
    random.Random(seed).shuffle(order)
    for place in order:
        if seen.setdefault(int(truth[place]), 0) < EXAMPLES_A_CLASS:
            seen[int(truth[place])] += 1
            found.append((seen[int(truth[place])], place))
    return [place for _, place in sorted(found)[:MAX_VECTOR_EXAMPLES]]  # a first row of every label comes before a second of any


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
