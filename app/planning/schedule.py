"""Default tokens per step and epochs for a dataset.

A model learns by steps, not by rows: three epochs of 37 conversations at 2,048 tokens per step are six steps, after which hardly
anything has changed. So small data gets smaller steps first, then more epochs, until there are enough steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from app.languages import mark
from app.objectives import OBJECTIVES

MIN_STEPS = 30
"""Fewer are warned about: most methods have hardly changed anything by then."""
EPOCHS = 3
"""For data that gives enough steps; the default of `RunSettings.epochs`."""
MAX_EVALUATIONS = 10
"""Maximum evaluations of a job whose epochs were raised: each evaluation generates answers, which takes seconds."""

STEP_TOKENS = 2048
MIN_MOST_TOKENS = 256
"""Minimum tokens per step where the batch is sized in rows, however short they are."""
GPU_STEP_TOKENS = ((40 * 2**30, 16_384), (16 * 2**30, 8192), (0, 4096))
"""Tokens per step and GPU of a generation job by the GPU's memory, (minimum bytes, tokens): a GPU's products need thousands of rows.
Measured on an H100 with 1.2 B: packs of 16,384 trained a seventh faster than packs of 8,192."""


PresetName = Literal["quick", "balanced", "best"]


class Preset(NamedTuple):
    """How long to train, as one choice: the minimum of steps for small data, and the epochs of larger data."""

    title: str
    summary: str
    steps: int
    epochs: float
    max_epochs: float
    more: Mapping[str, Any]  # run settings in addition to the schedule


PRESETS: Mapping[PresetName, Preset] = {
    "quick": Preset(
        mark("Quick look"), mark("About 25 steps, to see whether the data and the settings work."), 25, EPOCHS, 15, {"max_steps": 25}
    ),
    "balanced": Preset(
        mark("Balanced"), mark("At least 60 steps, or 3 passes over larger data. Keeps the best checkpoint."), 60, EPOCHS, 15, {}
    ),
    "best": Preset(
        mark("Best"),
        mark("At least 150 steps, or 5 passes, with more patience before it stops early. Keeps the best checkpoint."),
        150,
        5,
        40,
        {"early_stopping_patience": 5},
    ),
}


class Schedule(NamedTuple):
    max_tokens_per_step: int
    epochs: float
    evaluations_per_epoch: float


GOVERNED = (*Schedule._fields, "max_steps", "early_stopping_patience")
"""Run settings that a preset decides where they are empty."""
DERIVED = (*GOVERNED, "validation_fraction")
"""Run settings that a preset or the data decides where they are left empty."""

HELD_OUT_SHARE, MAX_HELD_OUT_SHARE = 0.1, 0.25
HELD_OUT_ROWS = 10
"""Minimum number of validation rows by which a clear gain is distinguishable from chance."""


def held_out_share(rows: int) -> float:
    """Default validation share of `rows`: a tenth, and of less than 100 rows enough for ten, but a quarter at most."""
    wanted = math.ceil(100 * HELD_OUT_ROWS / max(rows, 1)) / 100
    return min(MAX_HELD_OUT_SHARE, max(HELD_OUT_SHARE, wanted))


def schedule(
    task: str,
    rows: float,
    mean_tokens: float,
    *,
    gpu_memory_bytes: int | None = None,
    processes: int = 1,
    max_tokens_per_step: int | None = None,
    epochs: float | None = None,
    preset: PresetName = "balanced",
) -> Schedule:
    """The schedule for `rows` training rows of `mean_tokens` on average. Values that were set are kept, and the others adapted to
    them. `processes` GPUs train the job together: each gets as many tokens of a step as one would alone, as long as the data has
    enough for that many."""
    epoch, aim = max(1.0, rows * mean_tokens), PRESETS[preset]
    enough = (epochs or aim.epochs) * epoch / aim.steps
    tokens = max_tokens_per_step or _step_tokens(task, enough, mean_tokens, gpu_memory_bytes, processes)
    read = epochs or _epochs(epoch, tokens, aim)
    return Schedule(tokens, read, 2.0 if read <= EPOCHS else max(0.5, round(MAX_EVALUATIONS / read, 2)))


DRAWN_TOKENS, GPU_DRAWN_TOKENS = 2048, 8192
"""Tokens of a pass over answers that were drawn."""


def drawing_schedule(
    rows: float, prompts: int, *, updates: int = 1, gpu: bool = False, epochs: float | None = None, preset: PresetName = "balanced"
) -> Schedule:
    """The schedule of a job that draws answers to `prompts` of its `rows` at a time and makes `updates` steps on them: as many epochs as give
    the preset's steps, at least one."""
    aim = PRESETS[preset]
    batches = updates * max(1, math.ceil(rows / prompts))
    read = epochs or max(1.0, round(aim.steps / batches, 2))
    return Schedule(GPU_DRAWN_TOKENS if gpu else DRAWN_TOKENS, read, max(0.1, round(MAX_EVALUATIONS / read, 2)))


def steps(epoch: float, max_tokens_per_step: int, epochs: float) -> int:
    """Optimizer steps for `epochs` epochs of `epoch` tokens each."""
    return max(1, math.ceil(epochs * math.ceil(epoch / max_tokens_per_step)))


def _step_tokens(task: str, enough: float, mean_tokens: float, gpu_memory_bytes: int | None, processes: int) -> int:
    """Tokens per step; `enough` is the batch size that gives the target number of steps."""
    entry, most = OBJECTIVES[task], STEP_TOKENS
    if entry.rows_per_step is not None:
        most = max(MIN_MOST_TOKENS, min(round(entry.rows_per_step * mean_tokens), STEP_TOKENS))
    elif entry.larger_on_gpu and gpu_memory_bytes is not None:
        most = processes * next(tokens for least, tokens in GPU_STEP_TOKENS if gpu_memory_bytes >= least)
    least = max(entry.min_step_tokens, math.ceil(entry.min_rows_per_step * mean_tokens))
    if enough >= most:
        return most
    return min(most, max(least, int(enough) // 64 * 64))


def _epochs(epoch: float, tokens: int, aim: Preset) -> float:
    found = aim.epochs
    while found < aim.max_epochs and steps(epoch, tokens, found) < aim.steps:
        found += 1
    return found
