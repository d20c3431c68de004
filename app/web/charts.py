"""Charts as plain data: points for the browser to draw, with an equivalent table; and static drawings.

Those of a job page come from `app.jobs.progress.JobProgress`; their points are downsampled to what a screen can show, and the table
has fewer rows still. Drawings of a few points (scatter plots, learning curves) have all coordinates computed here, so that they
need no script. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.jobs.progress import JobProgress, Point, downsample
from app.languages import gettext, lowered
from app.metrics import METRICS

POINTS = 600
"""Points per line sent to a browser: more than a chart has pixels."""

ROWS = 40
"""Rows of a chart's table. The API's events and the results file have every step."""


@dataclass(frozen=True, slots=True)
class Series:
    name: str
    label: str
    color: int  # which of the stylesheet's --series-N
    points: list[Point]
    dots: bool = False  # few points, each with a marker

    @property
    def last(self) -> float | None:
        return self.points[-1][1] if self.points else None


@dataclass(frozen=True, slots=True)
class Chart:
    name: str
    title: str
    unit: str  # format of values: "", "bytes", "rate", "tokens/s"
    series: list[Series]

    @property
    def steps(self) -> list[int]:
        """The steps of the table's rows: those of the downsampled first line, and every point of the others."""
        first, *others = self.series
        kept = {step for step, _ in downsample(first.points, ROWS)}
        return sorted(kept | {step for line in others for step, _ in downsample(line.points, ROWS)})

    def rows(self) -> list[tuple[int, list[float | None]]]:
        values = [dict(line.points) for line in self.series]
        return [(step, [line.get(step) for line in values]) for step in self.steps]

    def data(self) -> dict[str, Any]:
        """The browser's data: for each line its steps and its values, as parallel lists, to the six digits that a chart can show."""
        lines = {}
        for line in self.series:
            points = downsample(line.points, POINTS)
            lines[line.name] = [[step for step, _ in points], [float(f"{value:.6g}") for _, value in points]]
        return lines


def charts(progress: JobProgress) -> list[Chart]:
    """Loss first, then the recipe's other metrics of steps, then what explains them, then the metrics of evaluations."""
    c = progress.curves
    loss = Chart(
        "loss",
        gettext("Loss"),
        "",
        [Series("loss", gettext("training"), 1, c["loss"]), Series("validation", gettext("validation"), 2, c["validation"], dots=True)],
    )
    single = [
        ("learning_rate", gettext("Learning rate"), "rate", 1),
        ("grad_norm", gettext("Gradient norm"), "", 4),
        ("tokens_per_second", gettext("Speed"), "tokens/s", 3),
        ("memory_bytes", gettext("Peak memory"), "bytes", 2),
    ]
    explaining = [Chart(name, title, unit, [Series(name, lowered(title), color, c[name])]) for name, title, unit, color in single]
    own: list[Chart] = []
    judged_only: list[Chart] = []
    for name in dict.fromkeys((*progress.step_metrics, *progress.metrics)):
        title, trained = _title(name), progress.step_metrics.get(name)
        judged = Series(name, gettext("validation") if trained else lowered(title), 2, progress.metrics.get(name, []), dots=True)
        lines = [judged] if not trained else [Series("training", gettext("training"), 1, trained), *([judged] if name in METRICS else [])]
        chart = Chart(name, title, "", lines)
        (own if trained else judged_only).append(chart)
    if progress.total_steps == 1:  # a recipe without optimizer steps has no curves
        return [loss, *judged_only]
    rewards = [chart for chart in own if chart.name == "reward"]  # where one is raised, it says more than the loss
    return [*rewards, loss, *(chart for chart in own if chart not in rewards), *explaining, *judged_only]


def _title(name: str) -> str:
    return gettext(METRICS[name].title if name in METRICS else name.replace("_", " ").capitalize())


def data(found: list[Chart], progress: JobProgress) -> dict[str, Any]:
    """All charts' points as one JSON value for the page."""
    return {"total": progress.total_steps, "last_event_id": progress.last_event_id, "charts": {chart.name: chart.data() for chart in found}}


# Pictures of a few points --------------------------------------------------------------------------------------------

WIDTH, HEIGHT = 640.0, 320.0
LEFT, RIGHT, TOP, BOTTOM = 64.0, 20.0, 16.0, 44.0
"""Margins of a drawing, for the labels of the axes."""
LOGARITHMIC_FROM = 20.0
"""An axis of amounts whose largest is at least this many times its smallest is logarithmic."""


@dataclass(frozen=True, slots=True)
class Scale:
    """One axis: its label, the format of values, and whether it measures an amount that begins at zero."""

    title: str
    write: Callable[[float], str]
    amount: bool = False


@dataclass(frozen=True, slots=True)
class Dot:
    """One point: its values, or its coordinates in a drawing, its number in the table, its label, and whether it is the best one."""

    x: float
    y: float
    number: int
    label: str
    best: bool = False


@dataclass(frozen=True, slots=True)
class Picture:
    """All coordinates of a drawing of WIDTH × HEIGHT. `line` joins the points from left to right; `base` is the y of a horizontal line."""

    dots: list[Dot]
    x_title: str
    y_title: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    line: str = ""
    base: float | None = None
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT
    right: float = WIDTH - RIGHT
    top: float = TOP
    bottom: float = HEIGHT - BOTTOM


def picture(points: Sequence[Dot], x: Scale, y: Scale, *, joined: bool = False, base: float | None = None) -> Picture | None:
    """A scatter plot, or with `joined` a line through the points; None with fewer than two of them."""
    if len(points) < 2:
        return None
    up, y_ticks = _axis([p.y for p in points] + ([base] if base is not None else []), y, HEIGHT - BOTTOM, TOP)
    left = _left(y_ticks)
    across, x_ticks = _axis([p.x for p in points], x, left, WIDTH - RIGHT)
    dots = [Dot(across(p.x), up(p.y), p.number, p.label, p.best) for p in points]
    ordered = sorted(dots, key=lambda d: d.x)
    return Picture(
        dots=_apart(dots) if not joined else ordered,
        x_title=x.title,
        y_title=y.title,
        x_ticks=x_ticks,
        y_ticks=y_ticks,
        line=" ".join(f"{d.x:.1f},{d.y:.1f}" for d in ordered) if joined else "",
        base=up(base) if base is not None else None,
        left=left,
    )


@dataclass(frozen=True, slots=True)
class LinesPicture:
    """The same for several lines: each has a name, its points as text, and the number of its color."""

    lines: list[tuple[str, str, int]]
    frame: Picture


def lines(named: Mapping[str, Sequence[tuple[float, float]]], x: Scale, y: Scale) -> LinesPicture | None:
    """Several lines on common axes; None with fewer than two points in all."""
    every = [point for points in named.values() for point in points]
    if len(every) < 2:
        return None
    up, y_ticks = _axis([value for _, value in every], y, HEIGHT - BOTTOM, TOP)
    left = _left(y_ticks)
    across, x_ticks = _axis([at for at, _ in every], x, left, WIDTH - RIGHT)
    drawn = [
        (name, " ".join(f"{across(at):.1f},{up(value):.1f}" for at, value in sorted(points)), color)
        for color, (name, points) in enumerate(named.items(), start=1)
    ]
    return LinesPicture(drawn, Picture([], x.title, y.title, x_ticks, y_ticks, left=left))


def _left(ticks: Sequence[tuple[float, str]]) -> float:
    """The margin in which the longest of these labels has room; what is not Latin is twice as wide."""
    return max([LEFT, *(14.0 + sum(8 if ord(letter) < 0x2E80 else 15 for letter in text) for _, text in ticks)])


def _axis(values: Sequence[float], scale: Scale, start: float, end: float) -> tuple[Callable[[float], float], list[tuple[float, str]]]:
    """(value → coordinate, [(coordinate, label)]) of an axis from `start` to `end`, with some space at both ends."""
    low, high = min(values), max(values)
    if scale.amount and low > 0 and high / low >= LOGARITHMIC_FROM:
        low, high = math.log10(low), math.log10(high)
        room = (high - low) * 0.06
        low, high = low - room, high + room
        found = [10.0**k for k in range(math.ceil(low), math.floor(high) + 1)]
        found = found if len(found) >= 2 else sorted({min(values), max(values)})

        def logarithmic(value: float) -> float:
            return start + (math.log10(value) - low) / (high - low) * (end - start)

        return logarithmic, [(logarithmic(v), scale.write(v)) for v in found[:: max(1, len(found) // 6)]]
    room = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    low, high = (0.0 if scale.amount and low >= 0 else low - room), high + room

    def linear(value: float) -> float:
        return start + (value - low) / (high - low) * (end - start)

    return linear, [(linear(v), scale.write(v)) for v in ticks(low, high)]


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """At most `most` round numbers between two values: steps of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / most
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * n for n in (1, 2, 5, 10) if size * n >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) + 0.0 for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _apart(dots: Sequence[Dot], least: float = 15.0) -> list[Dot]:
    """The points, with overlapping ones moved up or down a little so that their numbers are readable."""
    placed: list[Dot] = []
    for dot in dots:
        for n in range(200):
            y = dot.y + 3.0 * ((n + 1) // 2) * (1 if n % 2 else -1)
            free = all(abs(dot.x - other.x) >= least or abs(y - other.y) >= least for other in placed)
            if free and TOP <= y <= HEIGHT - BOTTOM:
                break
        else:
            y = dot.y
        placed.append(Dot(dot.x, y, dot.number, dot.label, dot.best))
    return placed
