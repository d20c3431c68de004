"""The data of evaluation pages: a line in the list, and the scores of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy.orm import Session

from app import objectives
from app.evaluation import service as evaluations
from app.evaluation import train_queue
from app.evaluation.train_queue import Place
from app.kit import ids
from app.kit.humanize import human_number
from app.languages import gettext, localized, lowered, mark
from app.metrics import METRICS, figure
from app.models import interpolation
from app.tables import Evaluation, Job, Model, User
from app.views import waiting

KINDS = {"scores": mark("Scores"), "advice": mark("Base model test"), "blend": mark("Adapter strength")}


class EvaluationLine(NamedTuple):
    title: str
    meaning: str
    base: float | None
    value: float
    better: bool | None
    between: str  # its 95% interval, where it was measured
    name: str


def rows(session: Session, found: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """The lines of a list; what is queued with its place."""
    places = train_queue.places(session) if any(one.status == "queued" for one in found) else {}
    return [_row(one, places.get(one.id)) for one in found]


def _row(evaluation: Evaluation, place: Place | None) -> dict[str, Any]:
    """A line: what was evaluated, and the most informative metric."""
    spec, result = evaluation.spec, evaluation.result or {}
    return {
        "url": f"/evaluations/{ids.public(ids.EVALUATION, evaluation.id)}",
        "kind": gettext(KINDS.get(evaluation.kind, evaluation.kind)),
        "model": spec["model"]["name"],
        "dataset": spec["dataset"]["name"],
        "part": gettext("validation split") if spec["part"] == "validation" else gettext("all rows"),
        "status": evaluation.status,
        "progress": evaluation.progress,
        "at": evaluation.created_at,
        "figure": _figure(evaluation.kind, spec.get("task"), result),
        "error": (evaluation.error or {}).get("message", ""),
        "place": place,
    }


def blend_panel(session: Session, user: User, model: Model | None, page: str) -> dict[str, Any] | None:
    """The data of `templates/parts/blend.html` for a fine-tuned model on `page`; None for a base."""
    job = session.get(Job, model.job_id) if model is not None and model.job_id is not None else None
    if model is None or job is None or model.status != "ready":
        return None
    found = evaluations.latest(session, user, model.id, "blend")
    return {
        "page": page,
        "model": model.name,
        "base": job.spec["model"]["name"],
        "dataset": ids.public(ids.DATASET, job.dataset_id),
        "why_not": interpolation.why_not(model.strategy, labels=bool(model.labels)),
        "evaluation": evaluations.to_json(found) if found else None,
        "waiting": waiting.in_words(session, found) if found and found.status == "queued" else None,
        "curve": interpolation.curve(found.result) if found and found.status == "succeeded" else None,
    }


def _figure(kind: str, task: str | None, result: Mapping[str, Any]) -> str:
    if kind == "blend" and result.get("points"):
        return gettext("best at %(strength)s", strength=localized(f"{result['best']:g}"))
    if kind == "advice":
        return gettext("%(factor)s × general text", factor=human_number(result["distance"], 2)) if result.get("distance") else ""
    scores = result.get("scores") or {}
    for name in (*objectives.get(task).metrics, "loss"):
        if isinstance(scores.get(name), int | float):
            return f"{lowered(gettext(METRICS[name].title))} {figure(scores[name], name, 3)}"
    return ""


def view(evaluation: Evaluation) -> dict[str, Any]:
    """The scores of one model, next to those of its base; classes are in `app.views.scores`."""
    result = evaluation.result or {}
    scores, base = result.get("scores") or {}, result.get("base") or {}
    return {
        "lines": [_line(name, base.get(name), scores, result) for name in METRICS if isinstance(scores.get(name), int | float)],
        "has_base": bool(base),
        "base_title": objectives.get(evaluation.spec.get("task")).evaluation_base_title,
        "rows": result.get("rows"),
        "skipped": result.get("skipped") or 0,
        "answers": result.get("answers") or 0,
        "unanswered": result.get("unanswered") or 0,
        "worst": result.get("worst") or [],
        "best": result.get("best") or [],
        "seconds": result.get("seconds"),
        "graders": [_grader(one) for one in result.get("graders") or []],
        "graded": result.get("graded") or [],
    }


def _grader(one: Mapping[str, Any]) -> dict[str, Any]:
    """A grader's line: better or worse is said only where the interval of the difference excludes zero."""
    low, high = one.get("difference") or (0.0, 0.0)
    return {**one, "better": None if low <= 0 <= high else low > 0}


def _line(name: str, base: Any, scores: Mapping[str, Any], result: Mapping[str, Any]) -> EvaluationLine:
    (title, meaning, less), value = METRICS[name][:3], scores[name]
    before = float(base) if isinstance(base, int | float) else None
    told = before is not None and before != value and not by_chance(result, name)
    better = (value < before) == less if told and before is not None else None
    return EvaluationLine(gettext(title), gettext(meaning), before, value, better, between(scores, name), name)


def between(scores: Mapping[str, Any], name: str) -> str:
    """The 95% interval of a score in words; empty where there is none."""
    low_high = (scores.get("intervals") or {}).get(name)
    if not low_high:
        return ""
    return gettext("%(low)s to %(high)s", low=figure(low_high[0], name, 3), high=figure(low_high[1], name, 3))


def by_chance(evaluation: Mapping[str, Any], name: str) -> bool:
    """Whether the difference of both models in a score may be due to chance: its 95% interval contains zero."""
    low_high = (evaluation.get("difference") or {}).get(name)
    return bool(low_high and low_high[0] <= 0 <= low_high[1])


def mistakes(labels: list[str], counts: list[list[int]], most: int = 12) -> list[dict[str, Any]]:
    """The most frequent confusions of one class with another."""
    found: list[dict[str, Any]] = [
        {"truth": labels[i], "answer": labels[j], "count": n} for i, row in enumerate(counts) for j, n in enumerate(row) if n and i != j
    ]
    return sorted(found, key=lambda m: (-m["count"], m["truth"], m["answer"]))[:most]
