"""Any runs in columns: their scores with intervals, the settings in which they differ, and their loss curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from urllib.parse import urlencode

from pydantic import BaseModel
from sqlalchemy.orm import Session

from app.errors import BadField
from app.evaluation import comparison_table, verdict
from app.evaluation.comparison_table import SCORED, ScoreColumn, Table, is_number
from app.jobs import progress_cache
from app.jobs import service as jobs
from app.jobs.progress import JobProgress
from app.kit import ids
from app.kit.forms import as_text, label_of
from app.kit.humanize import NOTHING, human_number
from app.languages import gettext, ngettext
from app.metrics import figure
from app.spec import JobSpec
from app.tables import Job, User
from app.views import job as job_view
from app.views.comparison import ability_interval, write
from app.web.charts import Chart, Series

MOST = 8
"""Runs whose lines can still be distinguished."""


class ComparedValue(NamedTuple):
    text: str
    note: str = ""
    best: bool = False


class ComparedLine(NamedTuple):
    title: str
    cells: list[ComparedValue]


def page(session: Session, user: User, keys: Sequence[str]) -> dict[str, Any]:
    """The data of `compare_runs.html` and its live part. Raises BadField for too few or too many runs, NotFound for an unknown one."""
    keys = list(dict.fromkeys(keys))
    if not 2 <= len(keys) <= MOST:
        chosen = ngettext("One run was chosen to compare.", "%(num)s runs were chosen to compare.", len(keys))
        raise BadField(
            chosen if keys else gettext("No run was chosen to compare."),
            hint=gettext("Tick 2 to %(most)s in the list of runs, then press Compare.", most=MOST),
            param="job",
        )
    found = [jobs.get(session, user, ids.parse(ids.JOB, key, param="job")) for key in keys]
    table = comparison_table.table_of(session, found)
    specs = [JobSpec.model_validate(job.spec) for job in found]
    settings = _settings(specs)
    told = [progress_cache.progress_of(session, job) for job in found]
    charts = _charts(found, told)
    return {
        "here": f"/jobs/compare?{urlencode([('job', key) for key in keys])}",
        "open": any(_is_open(job) for job in found),
        "runs": [
            {"number": n, "job": job, "url": job_view.url(job), "method": gettext(spec.strategy.title), "verdict": verdict.of_job(job)}
            for n, (job, spec) in enumerate(zip(found, specs, strict=True), 1)
        ],
        "figures": _figures(table, found),
        "differing": [line for line in settings if len({cell.text for cell in line.cells}) > 1],
        "same": [(line.title, line.cells[0].text) for line in settings if len({cell.text for cell in line.cells}) == 1],
        "charts": charts,
        "points": {"total": max((p.total_steps or 0 for p in told), default=0), "charts": {chart.name: chart.data() for chart in charts}},
    }


def _figures(table: Table, found: list[Job]) -> list[ComparedLine]:
    """A line for each column of a comparison's table in which any of the runs has a value."""
    return [
        ComparedLine(gettext(column.title), [_cell(table, column, row, job) for row, job in zip(table.rows, found, strict=True)])
        for column in table.columns
        if any(is_number(row[column.key]) for row in table.rows)
    ]


def _cell(table: Table, column: ScoreColumn, row: dict[str, Any], job: Job) -> ComparedValue:
    between = (((job.evaluation or {}).get("tuned") or {}).get("intervals") or {}).get(column.key)
    note = ability_interval(row) if column.key == "forgetting" else ""
    if column.key in SCORED and between:
        low, high = (figure(end, column.key, 3) for end in between)
        note = gettext("95%%: %(low)s to %(high)s", low=low, high=high)
    return ComparedValue(write(row[column.key], column.unit), note, row["job"] in table.winners[column.key])


# Settings -----------------------------------------------------------------------------------------------------------


def _settings(specs: list[JobSpec]) -> list[ComparedLine]:
    """Every setting of any of the runs; a dash where a run's method has no such setting."""
    each = [_of(spec) for spec in specs]
    titles = dict.fromkeys(title for one in each for title in one)
    return [ComparedLine(title, [ComparedValue(one.get(title, NOTHING)) for one in each]) for title in titles]


def _of(spec: JobSpec) -> dict[str, str]:
    """The settings of one run by their titles."""
    methods = {"random": gettext("random"), "stratified": gettext("stratified"), "grouped": gettext("grouped")}
    split = f"{methods.get(spec.split.method, spec.split.method)} {spec.split.column or ''}".strip() if spec.split else methods["random"]
    found = {
        gettext("Base model"): spec.model.name,
        gettext("Training data"): spec.dataset.name,
        gettext("Rows"): human_number(spec.dataset.rows),
        gettext("Validation data"): spec.validation.name if spec.validation else gettext("split of the training data"),
        gettext("Split method"): NOTHING if spec.validation else split,
        gettext("Method"): gettext(spec.strategy.title),
    }
    found |= _fields(spec.strategy) | _fields(spec.run) | (_fields(spec.preference) if spec.preference else {})
    return {**found, label_of("learning_rate", type(spec.run).model_fields["learning_rate"]): as_text(spec.learning_rate)}


def _fields(settings: BaseModel) -> dict[str, str]:
    fields = type(settings).model_fields
    return {label_of(name, info): as_text(getattr(settings, name)) or NOTHING for name, info in fields.items() if name != "name"}


# Curves -------------------------------------------------------------------------------------------------------------


def _charts(found: list[Job], told: list[JobProgress]) -> list[Chart]:
    """One chart of each loss, with a line for every run that has points of it, or may get them."""
    charts, names = [], _short([job.name for job in found])
    for curve, title in (("validation", gettext("Validation loss")), ("loss", gettext("Training loss"))):
        series = [
            Series(f"{curve}{n}", f"{n} {name}", n, progress.curves[curve], dots=curve == "validation")
            for n, (name, progress) in enumerate(zip(names, told, strict=True), 1)
        ]
        if any(line.points for line in series):
            drawn = [line for line, job in zip(series, found, strict=True) if line.points or _is_open(job)]
            charts.append(Chart(curve, title, "", drawn))
    return charts


def _is_open(job: Job) -> bool:
    return job.status in ("queued", "running")


def _short(names: list[str]) -> list[str]:
    """The names without the one of their comparison, where all are of the same."""
    parts = [name.partition(": ") for name in names]
    return [tail or name for name, (_, _, tail) in zip(names, parts, strict=True)] if len({head for head, _, _ in parts}) == 1 else names
