"""Blends: models interpolated between a base (0) and a model fine-tuned from it (1).

`NAME@0.5` names one wherever a model is named. Weights of a whole model are interpolated (WiSE-FT, Wortsman et al. 2021, Robust
fine-tuning of zero-shot models, arXiv:2109.01903); the correction of an adapter is scaled. Each strategy does it in its own way,
or says why it cannot (`Strategy.load_blended`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from app.errors import BadField
from app.kit.humanize import human_number
from app.languages import gettext, localized
from app.metrics import ability
from app.spec import Adapter, ModelRef
from app.strategies import STRATEGIES

POINTS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""The interpolation points of a blend evaluation that names no others."""
ENOUGH_GAIN = 0.9
"""A blend that keeps this share of the gain of fine-tuning is as good as the full model, for somebody who also minds the loss of
general ability."""
LITTLE = 0.005
"""Changes of general ability below this, in relative bits per byte, are not worth a sentence."""

_NAME = re.compile(r"(?P<name>.+)@(?P<share>\d*\.?\d+)")


def split_name(name: str) -> tuple[str, float | None]:
    """`NAME@0.5` → (`NAME`, 0.5); a name without a blend is unchanged. Raises BadField for a blend outside 0 to 1."""
    found = _NAME.fullmatch(name)
    if found is None:
        return name, None
    share = float(found["share"])
    if share > 1:
        raise BadField(
            gettext("A blend lies between 0, the base, and 1, the fine-tuned model; %(share)s does not.", share=found["share"]),
            hint=gettext("Write a share such as @0.5 behind the name."),
            param="model",
        )
    return found["name"], share


def full_name(name: str, share: float) -> str:
    return f"{name}@{share:g}"


def why_not(strategy: str | None, *, labels: bool = False) -> str | None:
    """Why the result of a strategy cannot be blended with its base; None when it can."""
    cls = STRATEGIES.get(strategy or "")
    if cls is None:
        return gettext("it was not fine-tuned here, so there is no base to go back to.")
    if labels:
        return gettext("not available for classifiers, whose base has no such head.")
    return None if cls.blends else gettext(cls.no_blend)


def blended(tuned: ModelRef, base: ModelRef, strategy: str, share: float) -> ModelRef:
    """The reference of a blend. A whole model is stored like an adapter of its base, so that both are available."""
    if share == 1:
        return tuned
    named = {"name": full_name(tuned.name, share), "kind": tuned.kind, "labels": tuned.labels}
    if STRATEGIES[strategy].adapter:
        *below, last = tuned.adapters
        return tuned.model_copy(update={**named, "adapters": (*below, last.model_copy(update={"blend": share}))})
    whole = Adapter(strategy=strategy, path=tuned.path, sha256=tuned.revision, blend=share)
    return base.model_copy(update={**named, "adapters": (*base.adapters, whole)})


# The curve --------------------------------------------------------------------------------------------------------------


class ChartPoint(NamedTuple):
    """One point of a chart, with the ends of its interval where it has one."""

    x: float
    y: float
    low: float | None
    high: float | None
    says: str


class ChartPanel(NamedTuple):
    """One chart over the blend, 320 wide and 150 high: its points, its polyline, and the ends of its axis."""

    title: str
    unit: str
    marks: list[ChartPoint]
    line: str
    top: str
    bottom: str
    zero: float | None


class Curve(NamedTuple):
    """Score and general ability at each point, as charts and as rows of a table, and the conclusion."""

    score: ChartPanel
    ability: ChartPanel | None
    rows: list[dict[str, Any]]
    advice: str
    best: float


Point = tuple[float, float, float | None, float | None]
"""x, y, and the lower and upper end of its interval where it has one."""
LEFT, RIGHT, TOP, BOTTOM = 52.0, 310.0, 12.0, 118.0


def curve(result: Mapping[str, Any] | None) -> Curve | None:
    """What the pages show of a finished blend evaluation; None where there is none."""
    points = list((result or {}).get("points") or [])
    if len(points) < 2:
        return None
    loss: list[Point] = [(p["blend"], p["score"], None, None) for p in points]
    kept: list[Point] = [(p["blend"], -100 * p["forgetting"], *_ends(p.get("interval"))) for p in points if p.get("forgetting") is not None]
    best, advice = advise(points)
    return Curve(
        score=_panel(gettext("Validation loss"), gettext("nats per token"), loss, "{:.3f}", zero=False),
        ability=_panel(gettext("General ability"), gettext("% against the base"), kept, "{:+.1f}", zero=True) if len(kept) > 1 else None,
        rows=points,
        advice=advice,
        best=best,
    )


def _ends(interval: Any) -> tuple[float | None, float | None]:
    return (-100 * interval[1], -100 * interval[0]) if interval else (None, None)


def _panel(title: str, unit: str, values: list[Point], form: str, *, zero: bool) -> ChartPanel:
    every = [y for _, *ys in values for y in ys if y is not None] + ([0.0] if zero else [])
    low, high = min(every), max(every)
    room = (high - low) or abs(high) or 1.0

    def place(y: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (y - low) / room

    def said(y: float) -> str:
        return localized(form.format(y).replace("-", "−"))

    marks = [
        ChartPoint(
            LEFT + (RIGHT - LEFT) * x,
            place(y),
            None if a is None else place(a),
            None if b is None else place(b),
            f"{_strength(x)}: {said(y)}",
        )
        for x, y, a, b in values
    ]
    line = " ".join(f"{m.x:.1f},{m.y:.1f}" for m in marks)
    return ChartPanel(title, unit, marks, line, said(low + room), said(low), place(0.0) if zero else None)


def advise(points: Sequence[Mapping[str, Any]]) -> tuple[float, str]:
    """(the recommended blend, why): of those that keep nearly all of the gain, the one with the best general ability."""
    base, tuned = points[0], points[-1]
    lowest = min(points, key=lambda p: p["score"])
    gain = base["score"] - lowest["score"]
    if gain <= 0:
        return 0.0, gettext("The base scores best on these rows: fine-tuning gained nothing here, at any strength.")
    if any(p.get("forgetting") is None for p in points):
        return lowest["blend"], gettext("The loss is lowest at %(strength)s.", strength=_strength(lowest["blend"]))
    good = [p for p in points if base["score"] - p["score"] >= ENOUGH_GAIN * gain - 1e-9]
    best = min(good, key=lambda p: (max(p["forgetting"], 0.0), -p["blend"]))
    if _saved(best, tuned) >= LITTLE:
        return best["blend"], _trade(best, base, tuned)
    if tuned["score"] - lowest["score"] > 0.01 * gain:
        return lowest["blend"], gettext(
            "At %(strength)s the loss is lowest, %(lowest)s instead of %(last)s: the last stretch of tuning went too far.",
            strength=_strength(lowest["blend"]),
            lowest=human_number(lowest["score"], 3),
            last=human_number(tuned["score"], 3),
        )
    milder = max(points[1:-1], key=lambda p: _saved(p, tuned) * (base["score"] - p["score"]))
    if _saved(milder, tuned) >= LITTLE:
        return 1.0, _trade(milder, base, tuned, instead=True)
    return 1.0, gettext("The fine-tuned model as it is: a lower strength would score worse and hardly keep more general ability.")


def _saved(point: Mapping[str, Any], tuned: Mapping[str, Any]) -> float:
    """How much less general ability is lost than by the full model; gains on general text do not count."""
    less: float = max(tuned["forgetting"], 0.0) - max(point["forgetting"], 0.0)
    return less


def _trade(point: Mapping[str, Any], base: Mapping[str, Any], tuned: Mapping[str, Any], *, instead: bool = False) -> str:
    """What a lower strength keeps, and costs; `instead` of the full model where that scores best."""
    whole, kept = base["score"] - tuned["score"], base["score"] - point["score"]
    values = {
        "strength": _strength(point["blend"]),
        "after": ability(point["forgetting"]),
        "before": ability(tuned["forgetting"]),
    }
    if 0 < kept <= whole:
        values |= {"share": localized(f"{kept / whole:.0%}")}
        if instead:
            return gettext(
                "The fine-tuned model as it is scores best. If general ability matters more: at %(strength)s it keeps %(share)s of the gain, "
                "and general ability changes by %(after)s instead of %(before)s.",
                **values,
            )
        return gettext(
            "At %(strength)s it keeps %(share)s of the gain, and general ability changes by %(after)s instead of %(before)s.", **values
        )
    if instead:
        return gettext(
            "The fine-tuned model as it is scores best. If general ability matters more: at %(strength)s it scores better than the whole, "
            "and general ability changes by %(after)s instead of %(before)s.",
            **values,
        )
    return gettext(
        "At %(strength)s it scores better than the whole, and general ability changes by %(after)s instead of %(before)s.", **values
    )


def _strength(blend: float) -> str:
    return localized(f"{blend:g}")
