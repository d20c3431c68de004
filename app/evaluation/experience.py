"""What past runs of a project measured, by method: what the advisor knows beyond rules and estimates."""

from __future__ import annotations

import statistics
import uuid
from collections import defaultdict
from typing import Any, NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.datasets import service as datasets
from app.evaluation.comparison_table import is_number, score_columns
from app.kit.humanize import human_number, human_percent
from app.languages import gettext, mark, ngettext
from app.metrics import METRICS, ability, judged_by
from app.ownership import mine
from app.strategies import STRATEGIES
from app.strategies._advice import Reason
from app.tables import Dataset, Job, User

MAX_JOBS = 80
"""Newest finished runs that are looked at."""
WHERE = (mark("the same task"), mark("this model"), mark("this model and data"))
"""How near past runs are to the question; of each method the nearest count."""
GAINED, MOST, LITTLE, NOTHING = 2, 6, -4, -8
"""Points: it gained; it gained most of all methods that ran there; less than half as much as that one; nothing."""
HALF = 0.5


class PastRun(NamedTuple):
    """What one run gained over its base in the deciding metric: a share of the base's loss, or points of a share; and the change of general
    ability, None where it was not measured."""

    strategy: str
    nearness: int  # an index of WHERE
    metric: str
    gain: float
    forgot: float | None


def reasons(session: Session, user: User, model_id: uuid.UUID, dataset: Dataset, task: str) -> dict[str, Reason]:
    """For each method that was run before, what came of it, and how much that speaks for or against it."""
    return weighed(_runs(session, user, model_id, dataset, task))


def _runs(session: Session, user: User, model_id: uuid.UUID, dataset: Dataset, task: str) -> list[PastRun]:
    """Of each run only the few values that count are read: specs and evaluations are long."""
    ended = mine(Job, user).where(Job.status == "succeeded", Job.evaluation.is_not(None))
    newest = ended.with_only_columns(Job.id).order_by(Job.created_at.desc()).limit(MAX_JOBS)
    metric, strategy = score_columns(task)[0].key, Job.spec["strategy"]
    query = select(
        strategy["name"].astext, strategy["weights"].astext, Job.evaluation["base"][metric], Job.evaluation["tuned"][metric], Job.forgetting["change"], Job.model_id, Job.dataset_id
    ).where(Job.id.in_(newest), Job.spec["task"].astext == task)  # fmt: skip
    family = set(datasets.family(session, dataset))
    found = []
    for name, weights, before, after, change, of_model, of_dataset in session.execute(query.order_by(Job.finished_at.desc())):
        gain = _gain(metric, before, after)
        if gain is not None and weights != "random" and name in STRATEGIES:
            nearness = (2 if of_dataset in family else 1) if of_model == model_id else 0
            found.append(PastRun(name, nearness, metric, gain, change))
    return found


def _gain(metric: str, before: Any, after: Any) -> float | None:
    """What was gained in the deciding metric; None where base or result have none."""
    if not is_number(before) or not is_number(after):
        return None
    if METRICS[metric].lower_is_better:
        return (before - after) / before if before > 0 else None
    return after - before


def weighed(runs: list[PastRun]) -> dict[str, Reason]:
    """One reason for each method, from its nearest runs. Methods are compared with each other only where they ran on the same model."""
    nearest: dict[str, int] = {}
    for run in runs:
        nearest[run.strategy] = max(nearest.get(run.strategy, 0), run.nearness)
    grouped: dict[str, list[PastRun]] = defaultdict(list)
    for run in runs:
        if run.nearness == nearest[run.strategy]:
            grouped[run.strategy].append(run)
    gains = {name: statistics.median(run.gain for run in group) for name, group in grouped.items()}
    return {name: Reason(_points(name, gains, nearest), _sentence(group)) for name, group in grouped.items()}


def _points(name: str, gains: dict[str, float], nearest: dict[str, int]) -> int:
    own, others = gains[name], [gain for other, gain in gains.items() if other != name and nearest[other] == nearest[name] > 0]
    if own <= 0:
        return NOTHING
    if others and own > max(others):
        return GAINED + MOST
    return GAINED + LITTLE if others and own < HALF * max(others) else GAINED


def _sentence(group: list[PastRun]) -> str:
    """`Measured here: 3 runs on this model and data lowered validation loss by 41% (median), with general ability −0.8%.`"""
    gain, metric = statistics.median(run.gain for run in group), group[0].metric
    if METRICS[metric].lower_is_better:
        by = human_percent(abs(gain))
    else:
        by = gettext("%(points)s points", points=human_number(abs(gain) * 100, 1))
    said = {
        "where": gettext(WHERE[group[0].nearness]),
        "metric": judged_by(metric),
        "by": gettext("%(by)s (median)", by=by) if len(group) > 1 else by,
    }
    forgot = [run.forgot for run in group if run.forgot is not None]
    if forgot:
        said["ability"] = ability(statistics.median(forgot))
    lowered = METRICS[metric].lower_is_better == (gain > 0)
    return _lowered(len(group), said) if lowered else _raised(len(group), said)


def _lowered(runs: int, said: dict[str, str]) -> str:
    if "ability" not in said:
        return ngettext(
            "Measured here: %(num)s run on %(where)s lowered %(metric)s by %(by)s.",
            "Measured here: %(num)s runs on %(where)s lowered %(metric)s by %(by)s.",
            runs,
            **said,
        )
    return ngettext(
        "Measured here: %(num)s run on %(where)s lowered %(metric)s by %(by)s, with general ability %(ability)s.",
        "Measured here: %(num)s runs on %(where)s lowered %(metric)s by %(by)s, with general ability %(ability)s.",
        runs,
        **said,
    )


def _raised(runs: int, said: dict[str, str]) -> str:
    if "ability" not in said:
        return ngettext(
            "Measured here: %(num)s run on %(where)s raised %(metric)s by %(by)s.",
            "Measured here: %(num)s runs on %(where)s raised %(metric)s by %(by)s.",
            runs,
            **said,
        )
    return ngettext(
        "Measured here: %(num)s run on %(where)s raised %(metric)s by %(by)s, with general ability %(ability)s.",
        "Measured here: %(num)s runs on %(where)s raised %(metric)s by %(by)s, with general ability %(ability)s.",
        runs,
        **said,
    )
