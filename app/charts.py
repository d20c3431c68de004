"""The charts of a job page as plain data: points for the browser to draw, and the table that says the same.

Pure, from `app.progress.Progress`. A chart's points are thinned to what a screen can show; the table has fewer rows still.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from app.progress import Point, Progress, downsample

POINTS = 600
"""Points per line sent to a browser: more than a chart has pixels to tell apart."""

ROWS = 40
"""Rows of a table twin. The API's events and the results file hold every step."""


@dataclass(frozen=True, slots=True)
class Series:
    name: str
    label: str
    color: int  # which of the stylesheet's --series-N
    points: list[Point]
    dots: bool = False  # few points, each worth a mark

    @property
    def last(self) -> float | None:
        return self.points[-1][1] if self.points else None


@dataclass(frozen=True, slots=True)
class Chart:
    name: str
    title: str
    unit: str  # how a value is written: "", "bytes", "rate", "tokens/s"
    series: list[Series]

    @property
    def steps(self) -> list[int]:
        """The steps of the table's rows: a thinned first line, and every mark of the others."""
        first, *others = self.series
        kept = {step for step, _ in downsample(first.points, ROWS)}
        return sorted(kept | {step for line in others for step, _ in downsample(line.points, ROWS)})

    def rows(self) -> list[tuple[int, list[float | None]]]:
        values = [dict(line.points) for line in self.series]
        return [(step, [line.get(step) for line in values]) for step in self.steps]

    def data(self) -> dict[str, Any]:
        """What the browser draws: for each line its steps and its values, side by side."""
        lines = {}
        for line in self.series:
            points = downsample(line.points, POINTS)
            lines[line.name] = [[step for step, _ in points], [value for _, value in points]]
        return lines


def charts(progress: Progress) -> list[Chart]:
    """Loss first, then what the recipe measures at every step, then what explains them, then what evaluations measure."""
    c = progress.curves
    loss = Chart(
        "loss",
        "Loss",
        "",
        [Series("loss", "training", 1, c["loss"]), Series("validation", "validation", 2, c["validation"], dots=True)],
    )
    single = [
        ("learning_rate", "Learning rate", "rate", 1),
        ("grad_norm", "Gradient norm", "", 4),
        ("tokens_per_second", "Speed", "tokens/s", 3),
        ("memory_bytes", "Memory, peak so far", "bytes", 2),
    ]
    explaining = [Chart(name, title, unit, [Series(name, title.lower(), color, c[name])]) for name, title, unit, color in single]
    own, judged_only = [], []
    for name in dict.fromkeys((*progress.step_metrics, *progress.metrics)):
        title, trained = name.replace("_", " ").capitalize(), progress.step_metrics.get(name)
        judged = Series(name, "validation" if trained else title.lower(), 2, progress.metrics.get(name, []), dots=True)
        chart = Chart(name, title, "", [Series("training", "training", 1, trained), judged] if trained else [judged])
        (own if trained else judged_only).append(chart)
    return [loss, *own, *explaining, *judged_only]


def data(found: list[Chart], progress: Progress) -> dict[str, Any]:
    """All charts' points as one JSON value for the page."""
    return {"total": progress.total_steps, "last_event_id": progress.last_event_id, "charts": {chart.name: chart.data() for chart in found}}
