"""The data of a finished job's evaluation: scores, classes, the confusion matrix, example rows, and forgetting.

Every part is shown only where the job recorded it, because jobs of earlier versions recorded less.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from app.languages import gettext, mark
from app.metrics import ABILITY, METRICS, ability
from app.objectives import OBJECTIVES
from app.views.evaluation import between, by_chance, mistakes

MAX_DRAWN_CLASSES = 100
MAX_NAMED_CLASSES = 14
"""Maximum classes for which the matrix has labels and counts; beyond it there are colors and the list next to it."""

SKILLS = {"instructions": mark("following instructions")}


class ScoreLine(NamedTuple):
    """One score of both models. `better` is whether the fine-tuned one is better; None where that is unclear. `between` is its 95
    % interval in words, where it was measured."""

    title: str
    meaning: str
    base: float | None
    tuned: float | None
    better: bool | None
    between: str
    name: str


@dataclass(frozen=True, slots=True)
class ConfusionCell:
    """A cell of the confusion matrix: the rows of class `truth` that were predicted as `answer`, and their share of its rows."""

    row: int
    column: int
    truth: str
    answer: str
    count: int
    share: float


class ConfusionMatrix(NamedTuple):
    labels: list[str]
    cells: list[ConfusionCell]
    named: bool


class ExampleAnswers(NamedTuple):
    """One example row. `base` and `tuned` are answers, None where nothing was generated."""

    line: int | None
    prompt: str
    reference: str
    base: str | None
    tuned: str | None
    base_loss: float | None
    tuned_loss: float | None
    probability: float | None


class ScoresView(NamedTuple):
    rows: int | None
    answers: int | None
    unanswered: int | None
    base_title: str
    lines: list[ScoreLine]
    classes: list[dict[str, Any]]
    mistakes: list[dict[str, Any]]
    matrix: ConfusionMatrix | None
    reliability: list[Mapping[str, Any]]
    worst: list[ExampleAnswers]
    best: list[ExampleAnswers]
    base_answered: bool


def view(evaluation: Mapping[str, Any] | None, task: str) -> ScoresView | None:
    """Base and fine-tuned model in two columns; None where nothing was evaluated."""
    whole = evaluation or {}
    tuned = _mapping(whole.get("tuned"))
    if not any(number(value) is not None for value in tuned.values()):
        return None
    base, labels, counts = _mapping(whole.get("base")), _texts(tuned.get("labels")), tuned.get("confusion")
    square = isinstance(counts, list) and len(counts) == len(labels) and all(isinstance(r, list) and len(r) == len(labels) for r in counts)
    worst, best = _readings(whole.get("worst")), _readings(whole.get("best"))
    return ScoresView(
        rows=_whole(whole.get("rows")) or _whole(tuned.get("rows")),
        answers=_whole(whole.get("answers")),
        unanswered=_whole(whole.get("unanswered")),
        base_title=OBJECTIVES[task].base_title,
        lines=[
            _line(name, base, tuned, task, by_chance(whole, name))
            for name in METRICS
            if number(tuned.get(name)) is not None and not _said_twice(name, tuned)
        ],
        classes=_classes(tuned.get("per_class")),
        mistakes=mistakes(labels, counts) if square and counts else [],
        matrix=matrix(labels, counts) if square and counts else None,
        reliability=[b for b in tuned.get("reliability") or [] if isinstance(b, Mapping) and {"confidence", "accuracy", "rows"} <= set(b)],
        worst=worst,
        best=best,
        base_answered=any(row.base is not None for row in (*worst, *best)),
    )


def number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _whole(value: Any) -> int | None:
    return int(value) if isinstance(value, int | float) and not isinstance(value, bool) and value > 0 else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _texts(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else []


def _said_twice(name: str, scores: Mapping[str, Any]) -> bool:
    """A classifier's loss is its log loss, so only one is shown."""
    return name == "loss" and scores.get("log_loss") == scores.get("loss")


def _line(name: str, base: Mapping[str, Any], tuned: Mapping[str, Any], task: str, chance: bool) -> ScoreLine:
    title, meaning, less = METRICS[name][:3]
    meaning = (OBJECTIVES[task].loss_unit or meaning) if name == "loss" else meaning
    before, after = number(base.get(name)), number(tuned.get(name))
    unfair = name in OBJECTIVES[task].unfair
    better = None if before is None or after is None or before == after or unfair or chance else (after < before) == less
    return ScoreLine(gettext(title), gettext(meaning), before, after, better, between(tuned, name), name)


def _classes(per_class: Any) -> list[dict[str, Any]]:
    """Classes that have rows, lowest F1 first."""
    found = [{"label": str(label), **scores} for label, scores in _mapping(per_class).items() if isinstance(scores, Mapping)]
    found = [c for c in found if c.get("rows") and number(c.get("f1")) is not None]
    return sorted(found, key=lambda c: (c["f1"], c["label"]))


def matrix(labels: list[str], counts: list[list[int]]) -> ConfusionMatrix | None:
    """The matrix with rows for true labels and columns for predictions; None where it would be too large to show."""
    if not 2 <= len(labels) <= MAX_DRAWN_CLASSES:
        return None
    cells = []
    for i, row in enumerate(counts):
        total = sum(row) or 1
        cells += [ConfusionCell(i, j, labels[i], labels[j], n, n / total) for j, n in enumerate(row) if n]
    return ConfusionMatrix(labels, cells, len(labels) <= MAX_NAMED_CLASSES)


def _readings(found: Any) -> list[ExampleAnswers]:
    if not isinstance(found, list):
        return []
    return [
        ExampleAnswers(
            line=_whole(row.get("line")),
            prompt=str(row.get("prompt") or ""),
            reference=str(row.get("reference") or ""),
            base=row.get("base_answer"),
            tuned=row.get("tuned_answer"),
            base_loss=number(row.get("base_loss")),
            tuned_loss=number(row.get("tuned_loss")),
            probability=number(row.get("probability")),
        )
        for row in found
        if isinstance(row, Mapping)
    ]


# General ability ------------------------------------------------------------------------------------------------------


class Skill(NamedTuple):
    """Bits per byte of one skill, and the relative change with its 95% interval; more bits are less ability."""

    name: str
    before: float | None
    after: float | None
    change: float
    interval: tuple[float, float] | None

    @property
    def figure(self) -> str:
        return ability(self.change)

    @property
    def between(self) -> str:
        if self.interval is None:
            return ""
        return gettext("%(low)s to %(high)s", low=ability(self.interval[1]), high=ability(self.interval[0]))

    @property
    def certain(self) -> bool:
        """Whether the interval excludes zero, so that the change is more than noise."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


class Forgot(NamedTuple):
    verdict: str
    sentence: str
    whole: Skill | None  # None where nothing was scored
    skills: list[Skill]

    def in_short(self, removable: bool) -> str:
        """`General ability −2.0% (95%: −4.0% to 0%), with the adapter on; removable.`"""
        assert self.whole is not None
        change = self.whole.figure
        if self.whole.interval:
            change = gettext("%(change)s (95%%: %(interval)s)", change=change, interval=self.whole.between)
        if removable:
            return gettext("General ability %(change)s, with the adapter on; removable.", change=change)
        return gettext("General ability %(change)s.", change=change)


def forgot(found: Mapping[str, Any] | None) -> Forgot | None:
    """The verdict with its interval, and one line per skill, the worst first; None where it was not requested."""
    if not found:
        return None
    said = str(found.get("verdict") or "")
    said = gettext(ABILITY.get(said, said))
    whole = _skill(gettext("all texts"), found) if number(found.get("before")) else None
    if whole is None:  # known without scoring texts, or known not to be measurable
        return Forgot(said, gettext(str(found["sentence"])), None, []) if found.get("sentence") else None
    skills = [skill for name, values in _mapping(found.get("skills")).items() if (skill := _skill(gettext(SKILLS.get(name, name)), values))]
    return Forgot(said, str(found.get("sentence") or ""), whole, sorted(skills, key=lambda s: -s.change))


def _skill(name: str, values: Any) -> Skill | None:
    values = _mapping(values)
    before, after, change = (number(values.get(key)) for key in ("before", "after", "change"))
    if change is None and before and after is not None:
        change = after / before - 1
    interval = values.get("interval")
    pair = (float(interval[0]), float(interval[1])) if isinstance(interval, list | tuple) and len(interval) == 2 else None
    return None if change is None else Skill(name, before, after, change, pair)
