"""The table of a comparison: metrics of its jobs in columns, the best job of each, and the conclusion of a learning curve.

A value is None where a job has not reached it. Memory and sizes are bytes, times seconds, losses nats per trained token,
forgetting the relative change of bits per byte on the general probe.
"""

from __future__ import annotations

import math
import uuid
from typing import Any, Literal, NamedTuple, TypeGuard

from sqlalchemy import Float, cast, select
from sqlalchemy.dialects.postgresql import distinct_on
from sqlalchemy.orm import Session

from app.errors import problem_json
from app.evaluation import comparison_plan, comparisons
from app.jobs import row_losses
from app.kit import ids, stats
from app.kit.humanize import human_number, human_percent
from app.languages import gettext, localized, mark, ngettext
from app.metrics import METRICS, Metric, judged_by
from app.objectives import DEFAULT, OBJECTIVES
from app.shapes import Shape
from app.strategies import STRATEGIES
from app.tables import JSON, Comparison, Event, Job, Model

Unit = Literal["", "share", "change", "count", "bytes", "seconds"]
Interval = tuple[float, float]
LEVEL = 0.05
"""An accuracy that moved less, and whose interval is not wider than twice this, has leveled off."""
WORTH_MORE = 0.02
"""A loss that fell by at least this share with the last doubling of the data is likely to fall with the next."""


class ScoreColumn(NamedTuple):
    """One column: the key of its value in a row, that of the predicted value, the format, and whether less is better."""

    key: str
    title: str
    unit: Unit
    less: bool
    predicted: str | None = None


class Table(NamedTuple):
    columns: list[ScoreColumn]  # the first is the score
    rows: list[JSON]
    winners: dict[str, list[str]]  # column → id of the job that is best in it, beyond chance
    bases: dict[str, JSON]  # base model → its scores before fine-tuning, by column; empty where they are not on the same rows

    @property
    def base(self) -> JSON:
        """The scores of the one base model; empty where there are several."""
        return next(iter(self.bases.values())) if len(self.bases) == 1 else {}


def score_columns(task: str, several_models: bool = False) -> list[ScoreColumn]:
    """The scores of a job, the deciding one first; with several base models those that do not depend on a tokenizer."""
    names = OBJECTIVES[task].across_models if several_models else OBJECTIVES[task].metrics
    found = [(name, METRICS[name]) for name in names or OBJECTIVES[task].metrics]
    return [ScoreColumn(name, gettext(metric.column or metric.title), metric.unit, metric.lower_is_better) for name, metric in found]


SCORED = tuple(dict.fromkeys(name for entry in OBJECTIVES.values() for name in (*entry.metrics, *entry.across_models)))
BASE = Metric._field_defaults["base"]
"""What a score is compared with that depends on the base model."""
PARAMETERS = ScoreColumn("parameters", mark("Parameters"), "count", True)
COSTS = [
    ScoreColumn("forgetting", mark("General ability"), "change", True),
    ScoreColumn("trainable_parameters", mark("Trainable"), "count", True, "predicted_trainable_parameters"),
    ScoreColumn("peak_memory_bytes", mark("Peak memory"), "bytes", True, "predicted_memory_bytes"),
    ScoreColumn("seconds", mark("Time"), "seconds", True, "predicted_seconds"),
    ScoreColumn("bytes", mark("On disk"), "bytes", True),
]


def table(session: Session, comparison: Comparison) -> Table:
    """Metrics of every job of the comparison that was not deleted."""
    found = table_of(session, comparisons.jobs_of(session, comparison))
    for row in found.rows:
        if comparison.kind == "learning_curve":
            row["title"] = gettext("%(share)s of the rows", share=human_percent(row["data_fraction"], 0))
        elif comparison.kind in ("models", "matrix"):
            row["title"] = f"{row['base_model']}, {row['title']}"
        if comparison.kind == "matrix":
            row["title"] = f"{row['dataset']}: {row['title']}"
    return found


def table_of(session: Session, found: list[Job]) -> Table:
    """Metrics of some jobs. Jobs evaluated on different rows can be shown together, but none is called the best in a score. With
    several base models the scores are those that do not depend on a tokenizer."""
    keys = [job.id for job in found]
    judged, counted, tuned = _judged(session, keys), _counted(session, keys), _tuned(session, keys)
    rows = [_row(job, judged.get(job.id, {}), counted.get(job.id), tuned.get(job.id)) for job in found]
    tasks = dict.fromkeys(job.spec["task"] for job in found) or [DEFAULT]
    several = len({row["base_model"] for row in rows}) > 1
    scores = {column.key: column for task in tasks for column in score_columns(task, several)}
    costs = [*([PARAMETERS] if several else []), *COSTS]
    columns = [*scores.values(), *(column._replace(title=gettext(column.title)) for column in costs)]
    alike = len({_checked(job) for job in found}) == 1
    bases = {
        job.spec["model"]["name"]: scores for job in found if alike and not _blank(job) and (scores := _scores(job.evaluation, "base"))
    }
    sure = [_sure(job, row, alike, several) for job, row in zip(found, rows, strict=True)]
    winners = {c.key: [] if c.key == PARAMETERS.key else _winners(rows, sure, c) for c in columns}
    if several and alike:
        winners |= {name: _best_on_rows(session, rows, name) for name in ("bits_per_byte",) if name in winners}
    return Table(columns, rows, winners, bases)


def _blank(job: Job) -> bool:
    """Whether it began with random weights, so that what it is compared with is no base model."""
    return bool(job.spec["strategy"].get("weights") == "random")


def _checked(job: Job) -> tuple[str, ...]:
    """What determines a job's validation rows."""
    spec = job.spec
    split = {"method": "random", "column": None, "seed": spec["run"].get("seed"), **(spec.get("split") or {})}
    run = [str(spec["run"].get(name)) for name in ("validation_fraction", "max_length")]
    return (spec["dataset"]["sha256"], str((spec.get("validation") or {}).get("sha256")), str(sorted(split.items())), *run)


def _judged(session: Session, keys: list[uuid.UUID]) -> dict[uuid.UUID, JSON]:
    """The scores of each job's best evaluation so far: the one with the lowest loss, whose checkpoint is kept."""
    loss = cast(Event.data["loss"].astext, Float)
    query = select(Event.job_id, Event.data).where(Event.job_id.in_(keys), Event.type == "evaluated")
    query = query.ext(distinct_on(Event.job_id)).order_by(Event.job_id, loss)
    return {key: _known({**(data.get("metrics") or {}), "loss": data["loss"]}) for key, data in session.execute(query)}


def _counted(session: Session, keys: list[uuid.UUID]) -> dict[uuid.UUID, int]:
    """Trainable parameters, as the trainers counted them."""
    query = select(Event.job_id, Event.data["trainable_parameters"].as_integer())
    return {key: n for key, n in session.execute(query.where(Event.job_id.in_(keys), Event.type == "started").order_by(Event.id))}


def _tuned(session: Session, keys: list[uuid.UUID]) -> dict[uuid.UUID, JSON]:
    """Name of each fine-tuned model, whether it is kept, and its bytes on disk without the base it needs."""
    query = select(Model.job_id, Model.name, Model.kept, Model.bytes)
    query = query.where(Model.job_id.in_(keys), Model.step.is_(None), Model.deleted_at.is_(None))
    return {key: {"model": name, "kept": kept, "bytes": size} for key, name, kept, size in session.execute(query) if key is not None}


def _scores(evaluation: JSON | None, of: str) -> JSON:
    return _known((evaluation or {}).get(of) or {})


def _known(found: JSON) -> JSON:
    return {name: found[name] for name in SCORED if is_number(found.get(name))}


def _row(job: Job, judged: JSON, counted: int | None, tuned: JSON | None) -> JSON:
    measured, estimate, forgot = job.measured or {}, job.estimate or {}, job.forgetting or {}
    change = forgot.get("change")
    if change is None and forgot.get("before") and forgot.get("after") is not None:
        change = forgot["after"] / forgot["before"] - 1
    strategy = job.spec["strategy"]["name"]
    scores = dict.fromkeys(SCORED) | judged | _scores(job.evaluation, "tuned")
    return {
        "job": ids.public(ids.JOB, job.id),
        "name": job.name,
        "status": job.status,
        "base_model": job.spec["model"]["name"],
        "dataset": job.spec["dataset"]["name"],
        "parameters": Shape.model_validate(job.spec["model"]["shape"]).parameters(),
        "strategy": strategy,
        "blank": _blank(job),
        "title": _title(job),
        "data_fraction": job.spec["run"].get("data_fraction", 1.0),
        "step": job.step,
        "total_steps": job.total_steps,
        "seconds_left": job.seconds_left,
        **scores,
        "rows": (job.evaluation or {}).get("rows"),
        "forgetting": change,
        "interval": forgot.get("interval"),
        "verdict": forgot.get("verdict"),
        "trainable_parameters": counted,
        "predicted_trainable_parameters": estimate.get("trainable_parameters"),
        "peak_memory_bytes": measured.get("peak_memory_bytes"),
        "predicted_memory_bytes": estimate.get("memory_bytes"),
        "seconds": measured.get("seconds"),
        "predicted_seconds": estimate.get("seconds"),
        **(tuned or {"model": None, "kept": None, "bytes": None}),
        "error": problem_json({name: job.error.get(name) for name in ("code", "message", "hint")}) if job.error else None,
    }


def _title(job: Job) -> str:
    """The strategy with its own settings."""
    strategy = job.spec["strategy"]
    if strategy["name"] not in STRATEGIES:
        return str(strategy["name"])
    return comparison_plan.title_of(STRATEGIES[strategy["name"]].model_validate(strategy))


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _sure(job: Job, row: JSON, alike: bool, several: bool) -> dict[str, Interval]:
    """95% interval of each measured value. On the same rows a score's interval is that of its difference from the base, which
    all share: with several base models that is so only where the base is chance or the commonest label."""
    found: dict[str, Interval] = {}
    if row["verdict"] == "nothing, by construction":
        found["forgetting"] = (0.0, 0.0)
    elif row["interval"]:
        found["forgetting"] = tuple(row["interval"])
    if not alike:
        return found
    evaluation = job.evaluation or {}
    found |= {name: tuple(between) for name, between in ((evaluation.get("tuned") or {}).get("intervals") or {}).items() if between}
    contest = evaluation.get("contest") or {}
    base = contest.get("base") or {}
    if base.get("interval") and not (several and METRICS[contest.get("metric") or "loss"].base == BASE):
        found[contest.get("metric") or "loss"] = (base["score"] + base["interval"][0], base["score"] + base["interval"][1])
    return found


def _winners(rows: list[JSON], sure: list[dict[str, Interval]], column: ScoreColumn) -> list[str]:
    """The finished job with the best value. A measured one must be significantly better than every other: where intervals
    overlap, nobody wins. Costs are exact, and a tie has no winner."""
    known: list[tuple[Interval, str]] = []
    for row, intervals in zip(rows, sure, strict=True):
        value = row[column.key]
        if row["status"] != "succeeded" or not is_number(value):
            continue
        between = intervals.get(column.key) if column.key in (*SCORED, "forgetting") else (value, value)
        if between is None:
            return []  # its interval is unknown, so it may be as good as the best
        known.append((between if column.less else (-between[1], -between[0]), row["job"]))
    known.sort()
    return [known[0][1]] if len(known) > 1 and all(known[0][0][1] < other[0] for other, _ in known[1:]) else []


def _best_on_rows(session: Session, rows: list[JSON], score: str) -> list[str]:
    """The job with the lowest bits per byte where, row by row of the same texts, it needs fewer nats than every other beyond chance."""
    done = sorted((row for row in rows if row["status"] == "succeeded" and is_number(row[score])), key=lambda row: row[score])
    if len(done) < 2:
        return []
    moved = (_moved_by(session, other["job"], done[0]["job"]) for other in done[1:])
    return [done[0]["job"]] if all(between is not None and between[1] < 0 for between in moved) else []


# The learning curve ---------------------------------------------------------------------------------------------------


class MoreDataVerdict(NamedTuple):
    """Whether more data would help, and the reason."""

    answer: Literal["more", "enough", "unclear"]
    sentence: str


def more_data(session: Session, found: Table) -> MoreDataVerdict | None:
    """The conclusion of a learning curve, by what the last part of the data still brought; None before all of it was trained on.

    A loss is compared on the same validation rows of both jobs, where their row losses have them: a change within chance is no
    gain.
    """
    column = found.columns[0]
    done = [row for row in found.rows if row["status"] == "succeeded" and is_number(row[column.key])]
    points = sorted(done, key=lambda row: row["data_fraction"])
    if len(points) < 2 or points[-1]["data_fraction"] < 1:
        return None
    last, newest = points[-2:]
    share, before, now = last["data_fraction"], last[column.key], newest[column.key]
    said = {"share": human_percent(share, 0), "metric": judged_by(column.key)}
    if column.unit == "share":
        said |= {"before": human_percent(before), "now": human_percent(now)}
        return _by_share(_moved_on(said, newest["rows"]), before, now, newest["rows"])
    said |= {"before": human_number(before, 3), "now": human_number(now, 3)}
    low, high = _moved_by(session, last["job"], newest["job"]) or (now - before, now - before)
    if low >= high:
        return _by_loss(_moved(said), before, now, low, high)
    moved = gettext(
        "From %(share)s of the rows to all of them the %(metric)s went from %(before)s to %(now)s (%(low)s to %(high)s on the same validation rows)",
        **said,
        low=localized(f"{low:+.3f}"),
        high=localized(f"{high:+.3f}"),
    )
    return _by_loss(moved, before, now, low, high)


def _moved(said: dict[str, str]) -> str:
    """The change as a clause that the conclusion goes on from."""
    return gettext("From %(share)s of the rows to all of them the %(metric)s went from %(before)s to %(now)s", **said)


def _moved_on(said: dict[str, str], rows: int | None) -> str:
    """The same with the number of validation rows, where it is known."""
    if not rows:
        return _moved(said)
    return ngettext(
        "From %(share)s of the rows to all of them the %(metric)s went from %(before)s to %(now)s on %(num)s validation row",
        "From %(share)s of the rows to all of them the %(metric)s went from %(before)s to %(now)s on %(num)s validation rows",
        rows,
        **said,
    )


def _by_loss(moved: str, before: float, now: float, low: float, high: float) -> MoreDataVerdict:
    """`low` to `high` is the interval of the change of the loss."""
    gain, least = (before - now) / max(abs(before), 1e-9), WORTH_MORE * abs(before)
    if gain >= WORTH_MORE and high < 0:
        better = gettext(
            "More data would very likely help. %(moved)s, %(gain)s better, and it has not levelled off.",
            moved=moved,
            gain=human_percent(gain, 0),
        )
        return MoreDataVerdict("more", better)
    if low > 0 and gain <= -WORTH_MORE:
        return MoreDataVerdict("unclear", _worse(moved))
    if abs(gain) < WORTH_MORE and max(-low, high) < 2 * least:
        little = gettext(
            "More data of this kind would bring little. %(moved)s: hardly at all. Better rows or another method might.", moved=moved
        )
        return MoreDataVerdict("enough", little)
    return MoreDataVerdict("unclear", gettext("Inconclusive. %(moved)s: too few validation rows.", moved=moved))


def _worse(moved: str) -> str:
    return gettext("Inconclusive. %(moved)s, which is worse: training may have gone on for too long.", moved=moved)


def _moved_by(session: Session, before: str, now: str) -> tuple[float, float] | None:
    """95% interval of the change of the loss between two jobs, on the validation rows that both have row losses for. A row's loss is
    that of its whole text, so that the tokens of the two may differ; it is in nats per token of the second job."""
    first, second = (
        {entry.line: entry for entry in row_losses.read(session, session.get_one(Job, ids.parse(ids.JOB, job))) if entry.held_out}
        for job in (before, now)
    )
    both = [line for line in second if line in first]
    if len(both) < 2:
        return None
    usual = sum(second[line].tokens for line in both) / len(both)
    nats = ({line: one[line].after * one[line].tokens for line in both} for one in (first, second))
    before_nats, now_nats = nats
    return stats.spread([(now_nats[line] - before_nats[line]) / usual for line in both])


def _by_share(moved: str, before: float, now: float, rows: int | None) -> MoreDataVerdict:
    """The same for an accuracy, whose uncertainty follows from the number of validation rows."""
    noise = 1.96 * math.sqrt(max(now * (1 - now), 1e-6) / rows) if rows else 0.02  # 95%, were the two measured on different rows
    gain = now - before
    if gain > noise:
        more = gettext("More data would very likely help. %(moved)s, more than chance explains, and it has not levelled off.", moved=moved)
        return MoreDataVerdict("more", more)
    if abs(gain) <= noise and (gain >= LEVEL or noise >= 2 * LEVEL):
        unclear = gettext("Inconclusive. %(moved)s, no more than chance explains: too few validation rows.", moved=moved)
        return MoreDataVerdict("unclear", unclear)
    if gain > -noise:
        enough = gettext("More data of this kind would bring little. %(moved)s, no more than chance explains.", moved=moved)
        return MoreDataVerdict("enough", enough)
    return MoreDataVerdict("unclear", _worse(moved))
