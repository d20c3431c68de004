"""Tokens per step and epochs that suit a dataset, where nobody says otherwise.

A model learns by steps, not by rows: 37 conversations read three times at 2,048 tokens a step are six steps, after which hardly
anything has changed. So small data gets smaller steps first, and is then read more often, until there are steps enough.
"""

from __future__ import annotations

import math
from typing import NamedTuple

TARGET_STEPS = 60
MIN_STEPS = 30
"""Fewer are warned about: most methods have then hardly begun to learn."""
MAX_EPOCHS = 15
EPOCHS = 3
"""Of data that gives steps enough; the default of `RunSettings.epochs`."""
MAX_EVALUATIONS = 10
"""Over the whole of a job whose epochs were raised: each writes answers, which takes seconds."""

STEP_TOKENS = 2048
ROWS_PER_STEP = 32
"""Labeled texts behind each step: a classifier learns one thing a text, so a step of as many tokens as for answers would hold
hundreds of texts, and an epoch hardly any steps."""
MIN_ROWS_PER_STEP = {"generation": 2, "preference": 2, "classification": 8}
MIN_STEP_TOKENS = 256
GPU_STEP_TOKENS = ((40 * 2**30, 16_384), (16 * 2**30, 8192), (0, 4096))
"""Tokens behind each step of a generation job by the GPU's memory, (bytes at least, tokens): a GPU's products want thousands of
rows. Measured on an H100 with 1.2 B: packs of 16,384 trained a seventh faster than packs of 8,192."""


class Schedule(NamedTuple):
    max_tokens_per_step: int
    epochs: float
    evaluations_per_epoch: float


def schedule(
    task: str,
    rows: float,
    mean_tokens: float,
    *,
    gpu_memory_bytes: int | None = None,
    max_tokens_per_step: int | None = None,
    epochs: float | None = None,
) -> Schedule:
    """For `rows` training rows of `mean_tokens` on average. A value that somebody chose is kept, and the other made to fit it."""
    epoch = max(1.0, rows * mean_tokens)
    tokens = max_tokens_per_step or _step_tokens(task, epoch, mean_tokens, gpu_memory_bytes, epochs or EPOCHS)
    read = epochs or _epochs(epoch, tokens)
    return Schedule(tokens, read, 2.0 if read <= EPOCHS else max(0.5, round(MAX_EVALUATIONS / read, 2)))


def steps(epoch: float, max_tokens_per_step: int, epochs: float) -> int:
    """Optimizer steps of an epoch of so many tokens, read so often."""
    return max(1, math.ceil(epochs * math.ceil(epoch / max_tokens_per_step)))


def _step_tokens(task: str, epoch: float, mean_tokens: float, gpu_memory_bytes: int | None, epochs: float) -> int:
    most = STEP_TOKENS
    if task == "classification":
        most = max(MIN_STEP_TOKENS, min(round(ROWS_PER_STEP * mean_tokens), STEP_TOKENS))
    elif task == "generation" and gpu_memory_bytes is not None:
        most = next(tokens for least, tokens in GPU_STEP_TOKENS if gpu_memory_bytes >= least)
    least = max(MIN_STEP_TOKENS if task != "classification" else 64, math.ceil(MIN_ROWS_PER_STEP[task] * mean_tokens))
    enough = epochs * epoch / TARGET_STEPS
    if enough >= most:
        return most
    return min(most, max(least, int(enough) // 64 * 64))


def _epochs(epoch: float, tokens: int) -> float:
    found = EPOCHS
    while found < MAX_EPOCHS and steps(epoch, tokens, found) < TARGET_STEPS:
        found += 1
    return found
