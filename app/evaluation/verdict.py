"""The verdict on a job, in one word, one sentence and its metrics: better than the base, no better, worse, …

    better        beats the base significantly, and no few-shot prompt does better
    no_better     no significant difference from the base, or a few-shot prompt does as well or better
    worse         the base does better
    undertrained  too few steps, or stopped while the validation loss was still falling
    overfitted    the validation loss rose again, and most of the gain was lost
    diverged      the loss rose far above its start; there is no model
    too_few_rows  too few validation rows for a verdict

Pure: it reads what the trainer measured (`contest` of the evaluation: the same rows read by the base, by the base with few-shot
examples, and by the fine-tuned model) and the job's row. No difference inside its 95% interval is called better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, Field, PrivateAttr

from app.kit.humanize import human_percent
from app.languages import gettext, localized, mark, ngettext
from app.metrics import METRICS
from app.spec import JobSpec
from app.tables import Job

Outcome = Literal["better", "no_better", "worse", "undertrained", "overfitted", "diverged", "too_few_rows"]

MIN_ROWS = 5
"""Below these no interval is meaningful."""
FEW_ROWS = 30
"""Below these a difference inside its interval means too few rows, not that there is no difference."""
MIN_STEPS = 30
"""Optimizer steps below which most methods have hardly begun to learn."""
STILL_FALLING = 0.15
"""Minimum share of the whole gain in the last third of a run that was stopped too early."""
LOST_AGAIN = 0.5
"""Minimum share of the gain that is lost again in an overfitted run."""

HEADINGS: dict[Outcome, str] = {
    "better": mark("Better than the base"),
    "no_better": mark("No better"),
    "worse": mark("Worse than the base"),
    "undertrained": mark("Undertrained"),
    "overfitted": mark("Overfitted"),
    "diverged": mark("Diverged"),
    "too_few_rows": mark("Too few rows to tell"),
}
BASE_IS_BETTER = {
    "of the base": mark("The base does better; do not use this result."),
    "of always answering the commonest label": mark("Always answering the commonest label does better; do not use this result."),
    "of a coin": mark("A coin does better; do not use this result."),
}
"""By the `beside` of a metric."""


class Suggestion(BaseModel):
    label: str
    order: dict[str, Any] = Field(description='What to change in the job\'s own order: `{"run": {"epochs": 15}}`')


class Verdict(BaseModel):
    """`interval` is the 95% interval of fine-tuned less base, in the metric's unit, over `n` validation rows."""

    outcome: Outcome
    sentence: str
    metric: str | None = None
    base: float | None = None
    few_shot: float | None = None
    tuned: float | None = None
    interval: tuple[float, float] | None = None
    n: int = 0
    suggestions: list[Suggestion] = []
    _beaten_by: str = PrivateAttr("")
    _forgot: bool = PrivateAttr(False)

    def with_words(self, *, beaten_by: str = "", forgot: bool = False) -> Verdict:
        """The verdict with what its heading follows from: whether examples do better in a `prompt` or by their `vectors`, and whether the
        sentence says what was forgotten."""
        self._beaten_by, self._forgot = beaten_by, forgot
        return self

    @property
    def heading(self) -> str:
        """The verdict in a few words, for a page."""
        if self._beaten_by:
            return gettext("A prompt does better") if self._beaten_by == "prompt" else gettext("Better without training")
        return gettext(HEADINGS[self.outcome])

    @property
    def details(self) -> str:
        """The sentence without what the heading says."""
        return self.sentence.removeprefix(f"{_better()} ").removeprefix(f"{_worse()} ")

    @property
    def says_forgetting(self) -> bool:
        """Whether the sentence says what was forgotten."""
        return self._forgot

    @property
    def ready(self) -> bool:
        """Whether the model may be called ready without a caveat."""
        return self.outcome == "better"


class VerdictSide(NamedTuple):
    """The fine-tuned model against another on the same rows. `gain` is the interval of the improvement, whatever the metric's direction."""

    rows: int
    score: float
    tuned: float
    interval: tuple[float, float] | None  # fine-tuned − other
    gain: tuple[float, float] | None

    @property
    def better(self) -> bool:
        return self.gain is not None and self.gain[0] > 0

    @property
    def worse(self) -> bool:
        return self.gain is not None and self.gain[1] < 0


def verdict(
    status: str,
    spec: JobSpec,
    evaluation: Mapping[str, Any] | None,
    error: Mapping[str, Any] | None = None,
    step: int | None = None,
    forgetting: Mapping[str, Any] | None = None,
) -> Verdict | None:
    """The verdict on a job that has ended; None while it goes on, and where it failed for a reason unrelated to its training."""
    if status == "failed":
        return diverged(spec, error) if (error or {}).get("code") == "diverged" else None
    if status == "cancelled":
        return interrupted(step)
    if status != "succeeded":
        return None
    found, contest = evaluation or {}, (evaluation or {}).get("contest") or {}
    if found.keys() - {"tryout"} and not contest:
        return None  # a job of an earlier version, which measured none of this
    metric = str(contest.get("metric") or "loss")
    base, few_shot = _side(contest.get("base"), metric), _side(contest.get("few_shot"), metric)
    if base is None:
        return Verdict(
            outcome="too_few_rows",
            sentence=gettext("No rows were held out, so it is not known whether it is better than its base."),
            suggestions=[
                Suggestion(
                    label=gettext("Hold out %(share)s and train again", share=human_percent(0.2, 0)),
                    order={"run": {"validation_fraction": 0.2}},
                )
            ],
        )
    figures = {
        "metric": metric,
        "base": base.score,
        "few_shot": few_shot.score if few_shot else None,
        "tuned": base.tuned,
        "interval": base.interval,
        "n": base.rows,
    }
    judged = _judge(spec, found, contest, base, few_shot, metric)
    forgot = _forgot(spec, forgetting)
    whole = Verdict(**figures, outcome=judged.outcome, sentence=" ".join([*judged.sentences, *forgot]), suggestions=judged.suggestions)
    return whole.with_words(beaten_by=judged.beaten_by, forgot=bool(forgot))


def of_job(job: Job) -> Verdict | None:
    """The verdict on a stored job, from its row alone."""
    return verdict(job.status, JobSpec.model_validate(job.spec), job.evaluation, job.error, job.step, job.forgetting)


# Jobs without a result --------------------------------------------------------------------------------------------------


def diverged(spec: JobSpec, error: Mapping[str, Any] | None) -> Verdict:
    rate = ((error or {}).get("suggestion") or {}).get("learning_rate") or spec.learning_rate / 10
    said = gettext("Training diverged.")
    sentence = f"{said} {(error or {}).get('message', '')}".strip()
    return Verdict(
        outcome="diverged",
        sentence=sentence,
        suggestions=[Suggestion(label=_with_rate(rate), order={"run": {"learning_rate": rate}})],
    )


def interrupted(step: int | None) -> Verdict:
    if step:
        sentence = gettext("Cancelled at step %(step)s, so it was not compared with its base.", step=step)
    else:
        sentence = gettext("Cancelled before the first step, so it was not compared with its base.")
    return Verdict(outcome="undertrained", sentence=sentence)


def _with_rate(rate: float) -> str:
    return gettext("Try again with learning rate %(rate)s", rate=localized(f"{rate:.1g}"))


def _better() -> str:
    return gettext("Better than the base.")


def _worse() -> str:
    return gettext("Worse than the base.")


# Jobs with one ----------------------------------------------------------------------------------------------------------


class _Judged(NamedTuple):
    outcome: Outcome
    sentences: list[str]
    suggestions: list[Suggestion]
    beaten_by: str = ""


def _judge(
    spec: JobSpec, found: Mapping[str, Any], contest: Mapping[str, Any], base: VerdictSide, few_shot: VerdictSide | None, metric: str
) -> _Judged:
    curve = [(int(step), float(loss)) for step, loss in found.get("curve") or [] if loss is not None and math.isfinite(float(loss))]
    steps, against = int(found.get("steps") or 0), _against(base, metric, spec, contest)
    more = _more_epochs(spec, found) if still_falling(curve) else []
    lower = [Suggestion(label=_with_rate(spec.learning_rate / 3), order=_rate(spec, 1 / 3))]
    if base.rows < MIN_ROWS or base.interval is None:
        return _Judged("too_few_rows", [_too_few(base), against], _hold_out_more(spec))
    if base.worse:
        return _Judged("worse", [_worse(), against, gettext(BASE_IS_BETTER[METRICS[metric].beside])], lower)
    if (best := overfitted(curve)) is not None and not base.better:
        sentence = gettext("Overfitted: the validation loss was lowest at step %(step)s and rose again.", step=best)
        return _Judged("overfitted", [sentence, against], [*lower, *_fewer_epochs(spec, best, steps)])
    if not base.better:
        if more or (0 < steps < MIN_STEPS and spec.strategy.recipe != "features"):
            return _Judged("undertrained", [_undertrained(steps, falling=bool(more)), against], more or _more_epochs(spec, found))
        if base.rows < FEW_ROWS:
            return _Judged("too_few_rows", [_too_few(base), against], _hold_out_more(spec))
        sentence = ngettext(
            "No better than the base, as far as %(num)s row can tell.",
            "No better than the base, as far as %(num)s rows can tell.",
            base.rows,
        )
        return _Judged("no_better", [sentence, against], more)
    if few_shot is not None and few_shot.worse:
        by = "vectors" if contest.get("few_shot_by") == "vectors" else "prompt"
        next_ = more or (_more_epochs(spec, found) if 0 < steps < MIN_STEPS else [])
        return _Judged("no_better", [_beaten(few_shot, contest, metric), against], next_, by)
    words = [_better(), against, *_beside_prompt(few_shot, contest, metric)]
    if more:
        words.append(gettext("Its validation loss was still falling at the end: more epochs would likely help."))
    elif best is not None:
        words.append(gettext("The loss rose again after step %(step)s; that checkpoint was kept.", step=best))
    if metric != "loss" and base.tuned == 1.0:
        words.append(gettext("Not one mistake: make sure that no training row stands among the held-out ones."))
    return _Judged("better", words, more)


def _too_few(base: VerdictSide) -> str:
    return gettext("Too few validation rows to tell (n = %(rows)s).", rows=base.rows)


def _undertrained(steps: int, *, falling: bool) -> str:
    if falling:
        return gettext("Undertrained: not yet better than the base beyond chance, and its validation loss was still falling.")
    return ngettext(
        "Undertrained: not yet better than the base beyond chance, and %(num)s step is few.",
        "Undertrained: not yet better than the base beyond chance, and %(num)s steps are few.",
        steps,
    )


def _side(side: Mapping[str, Any] | None, metric: str) -> VerdictSide | None:
    if not side or not side.get("rows"):
        return None
    low_high = side.get("interval")
    interval = (float(low_high[0]), float(low_high[1])) if low_high else None
    gain = interval and ((-interval[1], -interval[0]) if METRICS[metric].lower_is_better else interval)
    return VerdictSide(int(side["rows"]), float(side["score"]), float(side["tuned"]), interval, gain)


def _against(base: VerdictSide, metric: str, spec: JobSpec, contest: Mapping[str, Any]) -> str:
    """`Validation loss 2.31 against 3.10 (difference −0.92 to −0.66 with 95% confidence, 40 held-out rows).`"""
    said = {
        "metric": gettext(METRICS[metric].column or METRICS[metric].title),
        "tuned": _told(base.tuned, metric),
        "base": _told(base.score, metric),
        "of_base": gettext(METRICS[metric].beside),
        "rows": _rows(base.rows, crossed=bool(contest.get("cross_validated"))),
    }
    if not base.interval:
        return gettext("%(metric)s %(tuned)s against %(base)s %(of_base)s (%(rows)s).", **said)
    said["low"], said["high"] = (_signed(end, metric) for end in base.interval)
    if METRICS[metric].unit == "share":
        return gettext(
            "%(metric)s %(tuned)s against %(base)s %(of_base)s (difference %(low)s to %(high)s points with 95%% confidence, %(rows)s).",
            **said,
        )
    return gettext(
        "%(metric)s %(tuned)s against %(base)s %(of_base)s (difference %(low)s to %(high)s with 95%% confidence, %(rows)s).", **said
    )


def _rows(count: int, *, crossed: bool) -> str:
    if crossed:
        return ngettext("%(num)s row in cross-validation", "%(num)s rows in cross-validation", count)
    return ngettext("%(num)s validation row", "%(num)s validation rows", count)


def _forgot(spec: JobSpec, measured: Mapping[str, Any] | None) -> list[str]:
    """`It forgot much: general ability −20% (95%: −24 to −16%), with the adapter on; removable.` Nothing where little was lost."""
    found = measured or {}
    if found.get("verdict") not in ("forgot some", "forgot much") or not found.get("interval"):
        return []
    low, high = (-100 * float(end) for end in reversed(found["interval"]))
    ends = {"change": -100 * float(found["change"]), "low": low, "high": high}
    said = {name: f"{value:+.0f}".replace("-", "−") for name, value in ends.items()}
    much, removable = found["verdict"] == "forgot much", type(spec.strategy).adapter
    if much and removable:
        return [
            gettext("It forgot much: general ability %(change)s%% (95%%: %(low)s to %(high)s%%), with the adapter on; removable.", **said)
        ]
    if much:
        return [gettext("It forgot much: general ability %(change)s%% (95%%: %(low)s to %(high)s%%).", **said)]
    if removable:
        return [
            gettext("It forgot some: general ability %(change)s%% (95%%: %(low)s to %(high)s%%), with the adapter on; removable.", **said)
        ]
    return [gettext("It forgot some: general ability %(change)s%% (95%%: %(low)s to %(high)s%%).", **said)]


def _beaten(few_shot: VerdictSide, contest: Mapping[str, Any], metric: str) -> str:
    """Better than the base alone, but not than what examples reach without training."""
    score, tuned = _told(few_shot.score, metric), _told(few_shot.tuned, metric)
    if contest.get("few_shot_by") == "vectors":
        return gettext(
            "Better than the base, but nearest-neighbor classification without training does better still: %(score)s against %(tuned)s.",
            score=score,
            tuned=tuned,
        )
    return ngettext(
        "Better than the base, but the base with %(num)s example in its prompt does better still: %(score)s against %(tuned)s.",
        "Better than the base, but the base with %(num)s examples in its prompt does better still: %(score)s against %(tuned)s.",
        int(contest.get("examples") or 0),
        score=score,
        tuned=tuned,
    )


def _beside_prompt(few_shot: VerdictSide | None, contest: Mapping[str, Any], metric: str) -> list[str]:
    if few_shot is None:
        return []
    examples, score = int(contest.get("examples") or 0), _told(few_shot.score, metric)
    if contest.get("few_shot_by") == "vectors":
        if few_shot.better:
            return [gettext("Better than nearest-neighbor classification without training, too (%(score)s).", score=score)]
        return [
            gettext(
                "No significant difference from nearest-neighbor classification without training (%(score)s): no training may be needed.",
                score=score,
            )
        ]
    if few_shot.better:
        return [
            ngettext(
                "Better than the base with %(num)s example in its prompt, too (%(score)s).",
                "Better than the base with %(num)s examples in its prompt, too (%(score)s).",
                examples,
                score=score,
            )
        ]
    return [
        ngettext(
            "No significant difference from the base with %(num)s example in its prompt (%(score)s): a prompt may be enough.",
            "No significant difference from the base with %(num)s examples in its prompt (%(score)s): a prompt may be enough.",
            examples,
            score=score,
        )
    ]


def _told(value: float, metric: str) -> str:
    return localized(f"{value:.3g}") if METRICS[metric].unit != "share" else human_percent(value, 0)


def _signed(value: float, metric: str) -> str:
    return localized(f"{value:+.2g}" if METRICS[metric].unit != "share" else f"{value * 100:+.0f}").replace("-", "−")


# Curves -----------------------------------------------------------------------------------------------------------------


def still_falling(curve: Sequence[tuple[int, float]]) -> bool:
    """Whether the last third of a run brought a good part of its whole gain, and its last evaluation was its best."""
    if len(curve) < 3:
        return False
    (_, first), (last_step, last) = curve[0], curve[-1]
    before = next(loss for step, loss in reversed(curve) if step <= last_step * 2 / 3)
    return last == min(loss for _, loss in curve) and first > last and (before - last) > STILL_FALLING * (first - last)


def overfitted(curve: Sequence[tuple[int, float]]) -> int | None:
    """The step with the lowest validation loss where most of the gain was lost again at the end; else None."""
    if len(curve) < 3:
        return None
    step, least = min(curve, key=lambda point: point[1])
    first, last = curve[0][1], curve[-1][1]
    return step if last - least > LOST_AGAIN * max(first - least, 0.0) and last > 1.02 * least else None


# What to try next -------------------------------------------------------------------------------------------------------


def _more_epochs(spec: JobSpec, found: Mapping[str, Any]) -> list[Suggestion]:
    if spec.strategy.recipe == "features":
        return []
    steps = int(found.get("steps") or 0)
    longer = max(2.0, 60 / steps if steps else 2.0)
    epochs = math.ceil(spec.run.epochs * longer)
    if spec.run.max_steps:  # else a limit, as of the quick preset, would end it where it ended before
        limit = math.ceil(spec.run.max_steps * longer)
        label = ngettext("Train for %(steps)s step", "Train for %(steps)s steps", limit, steps=limit)
        return [Suggestion(label=label, order={"run": {"epochs": epochs, "max_steps": limit}})]
    return [_for_epochs(epochs)]


def _fewer_epochs(spec: JobSpec, best: int, steps: int) -> list[Suggestion]:
    if not steps or best >= steps:
        return []
    epochs = max(1, math.ceil(spec.run.epochs * best / steps))
    return [_for_epochs(epochs)]


def _for_epochs(epochs: int) -> Suggestion:
    label = ngettext("Train for %(epochs)s epoch", "Train for %(epochs)s epochs", epochs, epochs=epochs)
    return Suggestion(label=label, order={"run": {"epochs": epochs}})


def _hold_out_more(spec: JobSpec) -> list[Suggestion]:
    share = min(0.5, max(0.2, 2 * spec.run.validation_fraction))
    label = gettext("Hold out %(share)s of the rows", share=human_percent(share, 0))
    return [Suggestion(label=label, order={"run": {"validation_fraction": share}})]


def _rate(spec: JobSpec, factor: float) -> dict[str, Any]:
    return {"run": {"learning_rate": float(f"{spec.learning_rate * factor:.2g}")}}
