"""The data of the pages of searches: the list, the live table of trials, and the picture."""

from __future__ import annotations

import uuid
from typing import Any
from urllib.parse import urlencode

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.kit import ids
from app.languages import gettext, mark
from app.metrics import METRICS, figure
from app.searches import halving, service, space, table, trials
from app.searches.halving import END
from app.tables import JSON, Comparison, Job
from app.views import comparison as comparison_view
from app.web import charts
from app.web.charts import Dot, Picture, Scale

WORDS = {"waiting": mark("at a rung"), "pruned": mark("pruned"), "stopped": mark("stopped")}
REACHED = ("", mark("a ninth of its steps"), mark("a third of its steps"), mark("its end"))
"""What a trial has reached, by its level."""
STAGES = (mark("a ninth of the steps"), mark("a third of the steps"), mark("to the end"))


def url(search: Comparison) -> str:
    return comparison_view.url(search)


def rows(session: Session, found: list[Comparison]) -> list[dict[str, Any]]:
    """Each search with how many trials it began, and its dataset."""
    query = select(Job.comparison_id, Job.spec["dataset"]["name"].astext).where(Job.comparison_id.in_([one.id for one in found]))
    query = query.where(Job.deleted_at.is_(None), Job.trial["repeats"].astext.is_(None))
    named: dict[uuid.UUID | None, list[str]] = {}
    for key, dataset in session.execute(query):
        named.setdefault(key, []).append(dataset)
    return [
        {
            "search": one, "key": ids.public(ids.SEARCH, one.id), "url": url(one), "status": service.state_of(one)["status"],
            "says": gettext(service.state_of(one).get("why") or service.state_of(one).get("waits") or ""), "begun": len(named.get(one.id, [])),
            "most": service.order_of(one).trials, "model": one.order["model"], "dataset": next(iter(named.get(one.id, [])), ""),
        }
        for one in found
    ]  # fmt: skip


def page(session: Session, search: Comparison) -> dict[str, Any]:
    """The data of `search.html` and its live part."""
    found, said = trials.read(session, search), table.to_json(session, search)
    metric = trials.metric_of(found[0].job.spec["task"]) if found else "loss"
    lines = [_line(entry, metric, said) for entry in said["data"]]
    best = next((line for line in lines if line["number"] == said["best"]), None)
    return {
        "search": search,
        "url": url(search),
        "said": said,
        "open": said["status"] == "running",
        "lines": sorted(lines, key=lambda line: line["order"]),
        "begun": sum(line["repeats"] is None for line in lines),
        "metric": _title(metric),
        "by_loss": metric == "loss",
        "less": METRICS[metric].lower_is_better,
        "dataset": found[0].job.spec["dataset"]["name"] if found else "",
        "stages": _stages(found, halving.going(said["trials"], space.first_level(service.methods_of(search)))),
        "picture": _picture(lines, metric),
        "best": best,
        "again": f"/jobs/new?{urlencode({'clone': best['job']})}" if best else "",
    }


def _title(metric: str) -> str:
    return gettext(METRICS[metric].column or METRICS[metric].title)


def _line(entry: JSON, metric: str, said: JSON) -> dict[str, Any]:
    """A row of the table. Those that came furthest are first, by their score there."""
    score = entry["score"]
    signed = score if score is None or METRICS[metric].lower_is_better else -score
    return {
        **entry,
        "url": f"/jobs/{entry['job']}",
        "word": gettext(WORDS.get(entry["status"], "")),
        "reached": gettext(REACHED[entry["rung"]]),
        "text": figure(score, metric),
        "best": entry["number"] == said["winner"],
        "order": (-entry["rung"], signed is None, signed or 0.0, entry["number"]),
    }


def _stages(found: list[trials.TrialJob], going: list[int]) -> list[tuple[str, int, int]]:
    """(stage, how many trials are through it, how many it is for): the rungs, the end and the repetition."""
    firsts = [one for one in found if one.trial.repeats is None]
    stages = []
    for level, (title, left) in enumerate(zip(STAGES, going, strict=True), start=1):
        through = sum(level in one.trial.scores or max(one.trial.scores, default=0) > level for one in firsts)
        stages.append((gettext(title), through, left))
    again = [one for one in found if one.trial.repeats is not None]
    stages.append((gettext("the best again, with another seed"), sum(END in one.trial.scores for one in again), max(1, len(again))))
    return stages


def _picture(lines: list[dict[str, Any]], metric: str) -> Picture | None:
    """Score against learning rate, each trial at the last rung that it reached."""
    dots = [
        Dot(
            line["params"]["learning_rate"],
            line["score"],
            line["number"],
            gettext("%(trial)s: %(score)s at %(reached)s", trial=line["title"], score=line["text"], reached=line["reached"]),
            line["best"],
        )
        for line in lines
        if line["score"] is not None
    ]
    rate = Scale(gettext("Learning rate"), lambda v: f"{v:.0e}" if v else "0", amount=True)
    return charts.picture(dots, rate, Scale(_title(metric), lambda v: figure(v, metric, 3)))
