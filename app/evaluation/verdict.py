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

from pydantic import BaseModel, Field

from app.kit.humanize import human_percent, plural
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
            sentence="No rows were held out, so it is not known whether it is better than its base.",
            suggestions=[Suggestion(label="Hold out 20% and train again", order={"run": {"validation_fraction": 0.2}})],
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
    sentences = [*judged.sentences, *_forgot(spec, forgetting)]
    return Verdict(**figures, outcome=judged.outcome, sentence=" ".join(sentences), suggestions=judged.suggestions)


def of_job(job: Job) -> Verdict | None:
    """The verdict on a stored job, from its row alone."""
    return verdict(job.status, JobSpec.model_validate(job.spec), job.evaluation, job.error, job.step, job.forgetting)


# Jobs without a result --------------------------------------------------------------------------------------------------


def diverged(spec: JobSpec, error: Mapping[str, Any] | None) -> Verdict:
    rate = ((error or {}).get("suggestion") or {}).get("learning_rate") or spec.learning_rate / 10
    sentence = f"Training diverged. {(error or {}).get('message', '')}".strip()
    return Verdict(
        outcome="diverged",
        sentence=sentence,
        suggestions=[Suggestion(label=f"Try again with learning rate {rate:.1g}", order={"run": {"learning_rate": rate}})],
    )


def interrupted(step: int | None) -> Verdict:
    at = f"Cancelled at step {step}" if step else "Cancelled before the first step"
    return Verdict(outcome="undertrained", sentence=f"{at}, so it was not compared with its base.")


# Jobs with one ----------------------------------------------------------------------------------------------------------


class _Judged(NamedTuple):
    outcome: Outcome
    sentences: list[str]
    suggestions: list[Suggestion]


def _judge(
    spec: JobSpec, found: Mapping[str, Any], contest: Mapping[str, Any], base: VerdictSide, few_shot: VerdictSide | None, metric: str
) -> _Judged:
    curve = [(int(step), float(loss)) for step, loss in found.get("curve") or [] if loss is not None and math.isfinite(float(loss))]
    steps, against = int(found.get("steps") or 0), _against(base, metric, spec, contest)
    more = _more_epochs(spec, found) if still_falling(curve) else []
    lower = [Suggestion(label=f"Try again with learning rate {spec.learning_rate / 3:.1g}", order=_rate(spec, 1 / 3))]
    if base.rows < MIN_ROWS or base.interval is None:
        return _Judged("too_few_rows", [f"Too few validation rows to tell (n = {base.rows}). {against}"], _hold_out_more(spec))
    if base.worse:
        other = METRICS[metric].beside.removeprefix("of ").capitalize()
        return _Judged("worse", [f"Worse than the base. {against}", f"{other} does better; do not use this result."], lower)
    if (best := overfitted(curve)) is not None and not base.better:
        sentence = f"Overfitted: the validation loss was lowest at step {best} and rose again. {against}"
        return _Judged("overfitted", [sentence], [*lower, *_fewer_epochs(spec, best, steps)])
    if not base.better:
        if more or (0 < steps < MIN_STEPS and spec.strategy.recipe != "features"):
            why = "its validation loss was still falling" if more else f"{plural(steps, 'step')} {'is' if steps == 1 else 'are'} few"
            sentence = f"Undertrained: not yet better than the base beyond chance, and {why}. {against}"
            return _Judged("undertrained", [sentence], more or _more_epochs(spec, found))
        if base.rows < FEW_ROWS:
            return _Judged("too_few_rows", [f"Too few validation rows to tell (n = {base.rows}). {against}"], _hold_out_more(spec))
        return _Judged("no_better", [f"No better than the base, as far as {plural(base.rows, 'row')} can tell. {against}"], more)
    if few_shot is not None and few_shot.worse:
        sentence = f"Better than the base, but {_prompt(contest)} does better still: {_told(few_shot.score, metric)} against {_told(few_shot.tuned, metric)}."
        return _Judged("no_better", [sentence, against], more or (_more_epochs(spec, found) if 0 < steps < MIN_STEPS else []))
    words = [f"Better than the base. {against}", *_beside_prompt(few_shot, contest, metric)]
    if more:
        words.append("Its validation loss was still falling at the end: more epochs would likely help.")
    elif best is not None:
        words.append(f"The loss rose again after step {best}; that checkpoint was kept.")
    if metric != "loss" and base.tuned == 1.0:
        words.append("Not one mistake: make sure that no training row stands among the held-out ones.")
    return _Judged("better", words, more)


def _side(side: Mapping[str, Any] | None, metric: str) -> VerdictSide | None:
    if not side or not side.get("rows"):
        return None
    low_high = side.get("interval")
    interval = (float(low_high[0]), float(low_high[1])) if low_high else None
    gain = interval and ((-interval[1], -interval[0]) if METRICS[metric].lower_is_better else interval)
    return VerdictSide(int(side["rows"]), float(side["score"]), float(side["tuned"]), interval, gain)


def _against(base: VerdictSide, metric: str, spec: JobSpec, contest: Mapping[str, Any]) -> str:
    """`Validation loss 2.31 against 3.10 (difference −0.92 to −0.66 with 95% confidence, 40 held-out rows).`"""
    name, other = METRICS[metric].column or METRICS[metric].title, METRICS[metric].beside
    between = ""
    if base.interval:
        low, high = (_signed(end, metric) for end in base.interval)
        between = f"difference {low} to {high}{' points' if METRICS[metric].unit == 'share' else ''} with 95% confidence, "
    rows = f"{plural(base.rows, 'row')} in cross-validation" if contest.get("cross_validated") else plural(base.rows, "validation row")
    return f"{name} {_told(base.tuned, metric)} against {_told(base.score, metric)} {other} ({between}{rows})."


def _forgot(spec: JobSpec, measured: Mapping[str, Any] | None) -> list[str]:
    """`It forgot much: general ability −20% (95%: −24 to −16%), with the adapter on; removable.` Nothing where little was lost."""
    found = measured or {}
    if found.get("verdict") not in ("forgot some", "forgot much") or not found.get("interval"):
        return []
    low, high = (-100 * float(end) for end in reversed(found["interval"]))
    change = -100 * float(found["change"])
    removable = ", with the adapter on; removable" if type(spec.strategy).adapter else ""
    lost = f"It {found['verdict']}: general ability {change:+.0f}% (95%: {low:+.0f} to {high:+.0f}%){removable}."
    return [lost.replace("-", "−")]


def _beside_prompt(few_shot: VerdictSide | None, contest: Mapping[str, Any], metric: str) -> list[str]:
    if few_shot is None:
        return []
    if few_shot.better:
        return [f"Better than {_prompt(contest)}, too ({_told(few_shot.score, metric)})."]
    enough = "no training may be needed" if contest.get("few_shot_by") == "vectors" else "a prompt may be enough"
    return [f"No significant difference from {_prompt(contest)} ({_told(few_shot.score, metric)}): {enough}."]


def _prompt(contest: Mapping[str, Any]) -> str:
    if contest.get("few_shot_by") == "vectors":
        return "nearest-neighbor classification without training"
    return f"the base with {plural(int(contest.get('examples') or 0), 'example')} in its prompt"


def _told(value: float, metric: str) -> str:
    return f"{value:.3g}" if METRICS[metric].unit != "share" else human_percent(value, 0)


def _signed(value: float, metric: str) -> str:
    return (f"{value:+.2g}" if METRICS[metric].unit != "share" else f"{value * 100:+.0f}").replace("-", "−")


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
        return [Suggestion(label=f"Train for {limit} steps", order={"run": {"epochs": epochs, "max_steps": limit}})]
    return [Suggestion(label=f"Train for {epochs} epochs", order={"run": {"epochs": epochs}})]


def _fewer_epochs(spec: JobSpec, best: int, steps: int) -> list[Suggestion]:
    if not steps or best >= steps:
        return []
    epochs = max(1, math.ceil(spec.run.epochs * best / steps))
    return [Suggestion(label=f"Train for {epochs} epoch{'s' if epochs > 1 else ''}", order={"run": {"epochs": epochs}})]


def _hold_out_more(spec: JobSpec) -> list[Suggestion]:
    share = min(0.5, max(0.2, 2 * spec.run.validation_fraction))
    return [Suggestion(label=f"Hold out {human_percent(share, 0)} of the rows", order={"run": {"validation_fraction": share}})]


def _rate(spec: JobSpec, factor: float) -> dict[str, Any]:
    return {"run": {"learning_rate": float(f"{spec.learning_rate * factor:.2g}")}}
