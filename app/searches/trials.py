"""The trials of a search, read from its jobs: where each is, what its validation rows say at each rung, and the machine time it took."""

from __future__ import annotations

import uuid
from typing import NamedTuple

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.evaluation import comparisons
from app.evaluation.comparison_table import is_number, score_columns
from app.jobs import service as jobs
from app.metrics import METRICS
from app.searches.halving import END, SHARES, Budget, Score, SearchTrial
from app.tables import JSON, Comparison, Event, Job, MachineUse

Evaluations = list[tuple[int, JSON]]


class TrialJob(NamedTuple):
    """A trial, its job, and the seconds that it held a machine."""

    trial: SearchTrial
    job: Job
    seconds: float

    @property
    def params(self) -> JSON:
        found: JSON = (self.job.trial or {})["params"]
        return found


def read(session: Session, search: Comparison) -> list[TrialJob]:
    """The trials and repetitions that were not deleted, in the order in which they were begun."""
    found = [job for job in comparisons.jobs_of(session, search) if job.trial]
    said, held = _evaluations(session, found), seconds_held(session, [job.id for job in found])
    return [TrialJob(_trial(job, said.get(job.id, [])), job, held.get(job.id, 0.0)) for job in found]


def _evaluations(session: Session, found: list[Job]) -> dict[uuid.UUID, Evaluations]:
    query = select(Event.job_id, Event.data).where(Event.job_id.in_([job.id for job in found]), Event.type == "evaluated")
    said: dict[uuid.UUID, Evaluations] = {}
    for key, data in session.execute(query.order_by(Event.id)):
        said.setdefault(key, []).append((data["step"], {**(data.get("metrics") or {}), "loss": data["loss"]}))
    return said


def seconds_held(session: Session, keys: list[uuid.UUID]) -> dict[uuid.UUID, float]:
    """Seconds that jobs held a machine, all attempts together and the current one until now."""
    held = func.sum(func.extract("epoch", func.coalesce(MachineUse.ended_at, func.clock_timestamp()) - MachineUse.started_at))
    query = select(MachineUse.row_id, held).where(MachineUse.row_id.in_(keys), MachineUse.kind == "jobs").group_by(MachineUse.row_id)
    return {key: float(seconds) for key, seconds in session.execute(query)}


def _trial(job: Job, said: Evaluations) -> SearchTrial:
    facts = job.trial or {}
    rungs = dict(enumerate(facts["rungs"], start=1))
    scores = {level: score for level, step in rungs.items() if step and (score := score_at(job.spec["task"], said, step)) is not None}
    if job.status == "succeeded" and (score := score_at(job.spec["task"], said)) is not None:
        scores[END] = score
    at = next((level for level, step in rungs.items() if step == job.pause_at and step), None)
    return SearchTrial(
        number=facts["number"],
        moving=job.status in ("queued", "running"),
        at=at if job.status == "paused" and at in scores else None,
        out=bool(facts.get("out")) or job.status in ("failed", "cancelled") or (job.status == "succeeded" and END not in scores),
        failed=job.status == "failed",
        scores=scores,
        repeats=facts.get("repeats"),
    )


def score_at(task: str, said: Evaluations, step: int | None = None) -> Score | None:
    """The score of the checkpoint that is kept after so many steps, the one with the lowest loss; None before the run was evaluated there.
    Without a step that of the whole run."""
    seen = [one for one in said if one[0] > 0 and (step is None or one[0] <= step) and is_number(one[1]["loss"])]
    if not seen or (step is not None and max(at for at, _ in said) < step):
        return None
    best = min((values for _, values in seen), key=lambda values: values["loss"])
    metric = metric_of(task)
    value = best.get(metric)
    if not is_number(value):
        return best["loss"], best["loss"]
    return (value if METRICS[metric].lower_is_better else -value), best["loss"]


def metric_of(task: str) -> str:
    """The metric that decides: the first column of a comparison."""
    return score_columns(task)[0].key


def written(metric: str, score: Score) -> float:
    """The deciding metric of a score, in its own direction."""
    return score[0] if METRICS[metric].lower_is_better else -score[0]


def budget_of(found: list[TrialJob], methods_seconds: float, minutes: float | None, first: int) -> Budget:
    """What was used, and what one whole run takes: the estimate, corrected by how long the trials that stopped took for their share of it."""
    predicted = taken = 0.0
    for one in found:
        level = max(one.trial.scores, default=0)
        if level and not one.trial.moving and one.job.estimate:
            predicted += SHARES[level] * float(one.job.estimate["seconds"])
            taken += one.seconds
    run = methods_seconds * (taken / predicted if predicted else 1.0)
    return Budget(sum(one.seconds for one in found), run, minutes * 60 if minutes else None, first)


def still_open(found: list[TrialJob]) -> list[Job]:
    return [one.job for one in found if one.job.status not in jobs.ENDED]
