"""What a preset means for one dataset on the machine that trains: settings where nobody chose any."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from app.planning.schedule import MIN_ROWS_PER_STEP, PRESETS, PresetName, held_out_share, schedule
from app.run_settings import RunSettings, displaced
from app.tables import Dataset


def usual_run(
    dataset: Dataset, asked: Mapping[str, Any], *, validated_elsewhere: bool = False, preset: PresetName = "balanced"
) -> dict[str, Any]:
    """What a preset means for this dataset on this machine (app/planning/schedule.py), settings in `asked` as they are; nothing while the
    dataset is being read."""
    from app.machines import heartbeats

    if dataset.status != "ready" or dataset.task not in MIN_ROWS_PER_STEP:
        return {}
    try:
        wanted = RunSettings.model_validate({name: value for name, value in asked.items() if name in SIZED})
    except ValidationError:
        return {}  # what is wrong with them is said where the settings are read
    share = wanted.validation_fraction if "validation_fraction" in asked else held_out_share(dataset.good_rows or 0)
    rows = (dataset.good_rows or 0) * (1.0 if validated_elsewhere else 1 - share) * wanted.data_fraction
    each = min(mean_tokens(dataset), wanted.max_length) * (2 if dataset.task == "preference" else 1)
    found = schedule(
        dataset.task,
        rows,
        each,
        gpu_memory_bytes=heartbeats.training_machine().on(wanted.device).gpu_memory_bytes,
        max_tokens_per_step=max(1, round(wanted.step_tokens(each))) if {"max_tokens_per_step", "batch_size"} & asked.keys() else None,
        epochs=wanted.epochs if "epochs" in asked else None,
        preset=preset,
    )._asdict() | dict(PRESETS[preset].more)
    found["max_tokens_per_step"] = max(16, found["max_tokens_per_step"] // wanted.gradient_accumulation_steps)
    found["validation_fraction"] = share
    given = {*asked, *displaced(dict(asked))}
    return {name: value for name, value in found.items() if name not in given}


SIZED = (
    "max_tokens_per_step", "batch_size", "gradient_accumulation_steps", "epochs", "validation_fraction", "data_fraction", "max_length", "device",
)  # fmt: skip
"""Settings that decide how many steps a dataset gives."""


def mean_tokens(dataset: Dataset) -> float:
    """Mean tokens of a row; where they are not counted yet, a token is taken for four characters."""
    from app.datasets import service as datasets

    stats = datasets.stats(dataset)
    total = stats.tokens if stats.tokens is not None else stats.characters / 4
    return max(total / max(stats.rows, 1), 1.0)


def rows_per_step(dataset: Dataset, run: RunSettings) -> int:
    """The batch size as other tools count it: rows of mean length behind each optimizer step."""
    each = mean_tokens(dataset) * (2 if dataset.task == "preference" else 1)
    return max(1, round(run.step_tokens(each) / each))
