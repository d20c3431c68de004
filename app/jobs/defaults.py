"""The settings of a preset for one dataset on the training machine, where nobody chose any."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from app import objectives
from app.machines.placement import Resources
from app.objectives import OBJECTIVES, DrawnSettings
from app.planning.schedule import PRESETS, PresetName, drawing_schedule, held_out_share, schedule
from app.run_settings import RunSettings, displaced
from app.tables import Dataset


def usual_run(
    dataset: Dataset,
    asked: Mapping[str, Any],
    *,
    validated_elsewhere: bool = False,
    preset: PresetName = "balanced",
    drawn: DrawnSettings | None = None,
    resources: Resources | None = None,
) -> dict[str, Any]:
    """The settings of a preset for this dataset on this machine (app/planning/schedule.py), with settings in `asked` unchanged;
    empty while the dataset is being parsed. `drawn` says what each step draws, where a job learns from answers that are drawn;
    `resources` what it asks of the machine."""
    from app.datasets import service as datasets
    from app.machines import heartbeats

    task = datasets.usual_task(dataset)
    if dataset.status != "ready" or task not in OBJECTIVES:
        return {}
    try:
        wanted = RunSettings.model_validate({name: value for name, value in asked.items() if name in SIZED})
    except ValidationError:
        return {}  # errors in them are reported where the settings are parsed
    share = wanted.validation_fraction if "validation_fraction" in asked else held_out_share(dataset.good_rows or 0)
    rows = (dataset.good_rows or 0) * (1.0 if validated_elsewhere else 1 - share) * wanted.data_fraction
    each = min(mean_tokens(dataset), wanted.max_length) * OBJECTIVES[task].sequences_per_row
    machine = heartbeats.training_machine(resources, wanted.device).on(wanted.device)
    given = {*asked, *displaced(dict(asked))}
    if drawn is not None:
        epochs = wanted.epochs if "epochs" in asked else None
        planned = drawing_schedule(rows, drawn.prompts_per_step, updates=drawn.updates, gpu=machine.cuda, epochs=epochs, preset=preset)
        usual = planned._asdict() | dict(PRESETS[preset].more) | {"validation_fraction": share}
        return {name: value for name, value in usual.items() if name not in given}
    found = schedule(
        task,
        rows,
        each,
        gpu_memory_bytes=machine.gpu_memory_bytes,
        processes=machine.processes,
        max_tokens_per_step=max(1, round(wanted.step_tokens(each))) if {"max_tokens_per_step", "batch_size"} & asked.keys() else None,
        epochs=wanted.epochs if "epochs" in asked else None,
        preset=preset,
    )._asdict() | dict(PRESETS[preset].more)
    found["max_tokens_per_step"] = max(16, found["max_tokens_per_step"] // wanted.gradient_accumulation_steps)
    found["validation_fraction"] = share
    return {name: value for name, value in found.items() if name not in given}


SIZED = (
    "max_tokens_per_step", "batch_size", "gradient_accumulation_steps", "epochs", "validation_fraction", "data_fraction", "max_length", "device",
)  # fmt: skip
"""Settings that decide how many steps a dataset gives."""


def mean_tokens(dataset: Dataset) -> float:
    """Mean tokens of a row; four characters count as a token where they are not counted yet."""
    from app.datasets import service as datasets

    stats = datasets.stats(dataset)
    total = stats.tokens if stats.tokens is not None else stats.characters / 4
    return max(total / max(stats.rows, 1), 1.0)


def rows_per_step(dataset: Dataset, run: RunSettings) -> int:
    """The batch size as other tools count it: rows of mean length behind each optimizer step."""
    from app.datasets import service as datasets

    each = mean_tokens(dataset) * objectives.get(datasets.usual_task(dataset)).sequences_per_row
    return max(1, round(run.step_tokens(each) / each))
