"""The data of comparison pages: the table with its best values marked, the plot, and the conclusion of a learning curve."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.evaluation import comparison_table, comparisons, matrix
from app.evaluation.comparison_table import ScoreColumn, Table, is_number
from app.kit import ids
from app.kit.humanize import NOTHING, human_bytes, human_count, human_number, human_percent, human_seconds
from app.languages import gettext, mark
from app.metrics import ABILITY, ability
from app.strategies import STRATEGIES
from app.tables import Comparison, Job
from app.web import charts
from app.web.charts import Dot, LinesPicture, Picture, Scale

OPEN = ("queued", "running", "paused")
KINDS = {
    "strategies": mark("methods"),
    "learning_curve": mark("learning curve"),
    "models": mark("base models"),
    "matrix": mark("matrix"),
}


class SizeCurve(NamedTuple):
    """One drawing against the number of parameters."""

    title: str
    picture: LinesPicture
    less: bool


def url(comparison: Comparison) -> str:
    if comparison.kind == comparisons.SEARCH:
        return f"/searches/{ids.public(ids.SEARCH, comparison.id)}"
    return f"/compare/{ids.public(ids.COMPARISON, comparison.id)}"


def write(value: Any, unit: str) -> str:
    """A value of a column, formatted."""
    if not is_number(value):
        return NOTHING
    writers: dict[str, Callable[[Any], str]] = {
        "bytes": human_bytes,
        "seconds": human_seconds,
        "count": human_count,
        "share": human_percent,
        "change": ability,
        "": lambda v: human_number(v, 3),
    }
    return str(writers[unit](value))


# The list -------------------------------------------------------------------------------------------------------------


def rows(session: Session, found: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Each comparison with the progress of its jobs."""
    query = select(Job.comparison_id, Job.status, Job.spec["dataset"]["name"].astext)
    query = query.where(Job.comparison_id.in_([c.id for c in found]), Job.deleted_at.is_(None)).order_by(Job.created_at)
    jobs: dict[uuid.UUID | None, list[tuple[str, str]]] = {}
    for key, status, dataset in session.execute(query):
        jobs.setdefault(key, []).append((status, dataset))
    return [_row(comparison, jobs.get(comparison.id, [])) for comparison in found]


def _row(comparison: Comparison, found: list[tuple[str, str]]) -> dict[str, Any]:
    """`found` are the statuses of its jobs, each with its dataset."""
    states = [status for status, _ in found]
    return {
        "comparison": comparison,
        "key": ids.public(ids.COMPARISON, comparison.id),
        "url": url(comparison),
        "kind": gettext(KINDS[comparison.kind]),
        "status": (status := comparisons.status_of(states)),
        "open": status in OPEN,
        "jobs": len(found),
        "ended": sum(one not in OPEN for one in states),
        "failed": states.count("failed"),
        "model": ", ".join(comparison.order.get("models") or [comparison.order["model"]]),
        "dataset": ", ".join(dict.fromkeys(dataset for _, dataset in found)),
    }


# One comparison -------------------------------------------------------------------------------------------------------


def page(session: Session, comparison: Comparison, x: str = "", y: str = "") -> dict[str, Any]:
    """The data of `comparison.html` and its live part. `x` and `y` are columns; unknown ones mean the default."""
    table = comparison_table.table(session, comparison)
    found = comparisons.jobs_of(session, comparison)
    curve = comparison.kind == "learning_curve"
    across, up = _axes(table, x or ("parameters" if comparison.kind == "models" else ""), y)
    picture = _curve(table) if curve else None if comparison.kind == "matrix" else _scatter(table, across, up)
    cells = matrix.matrix(session, comparison) if comparison.kind == "matrix" else None
    return {
        "comparison": comparison,
        "url": url(comparison),
        "curve": curve,
        "status": (status := comparisons.status_of([job.status for job in found])),
        "open": status in OPEN,
        "ended": sum(job.status not in OPEN for job in found),
        "seconds_left": _seconds_left(found),
        "table": table,
        "verdicts": {row["verdict"] for row in table.rows},
        "lines": _lines(table),
        "bases": [
            (name, [(column, write(scores.get(column.key), column.unit) if column.key in scores else "") for column in table.columns])
            for name, scores in table.bases.items()
        ],
        "first": found[0] if found else None,
        "across": across,
        "up": up,
        "picture": picture,
        "drawn_numbers": {dot.number for dot in picture.dots} if picture else set(),
        "says": comparison_table.more_data(session, table) if curve else None,
        "matrix": _matrix(cells) if cells else None,
        "sizes": _sizes([(column.name, column.table) for column in cells.columns] if cells else [("", table)]),
    }


def _matrix(found: matrix.Matrix) -> dict[str, Any]:
    """The matrix with every cell formatted."""
    return {
        "columns": found.columns,
        "rows": [
            {
                "model": row.model, "title": row.title, "parameters": human_count(row.parameters),
                "cells": [_cell(cell, column.score) if cell else None for cell, column in zip(row.cells, found.columns, strict=True)],
            }
            for row in found.rows
        ],
    }  # fmt: skip


def _cell(cell: matrix.MatrixCell, score: ScoreColumn) -> dict[str, Any]:
    low_high = [write(end, score.unit) for end in cell.interval or ()]
    between = gettext("%(low)s to %(high)s", low=low_high[0], high=low_high[1]) if low_high else ""
    return {
        "url": f"/jobs/{cell.row['job']}", "text": write(cell.score, score.unit) if cell.score is not None else "", "between": between,
        "best": cell.best, "status": cell.row["status"],
    }  # fmt: skip


def _sizes(tables: list[tuple[str, Table]]) -> list[SizeCurve]:
    """The size curve: score, memory and time against the parameters of the base model, a line for each method; of a matrix a score for each
    dataset. Empty without two sizes."""
    found = [_size_curve(table, table.columns[0], name) for name, table in tables]
    if tables and any(found):
        by_key = {column.key: column for column in tables[0][1].columns}
        found += [_size_curve(tables[0][1], by_key[key], tables[0][0]) for key in ("peak_memory_bytes", "seconds")]
    return [one for one in found if one]


def _size_curve(table: Table, y: ScoreColumn, dataset: str) -> SizeCurve | None:
    named: dict[str, list[tuple[float, float]]] = {}
    for row in table.rows:
        if is_number(row[y.key]) and row["status"] == "succeeded":
            name = gettext("From nothing") if row["blank"] else gettext(STRATEGIES[row["strategy"]].title)
            named.setdefault(name, []).append((float(row["parameters"]), float(row[y.key])))
    if len({size for points in named.values() for size, _ in points}) < 2:
        return None
    drawn = charts.lines(named, Scale(gettext("Parameters"), human_count, amount=True), _scale(y))
    title = gettext(y.title)
    title = gettext("%(score)s on %(dataset)s", score=title, dataset=dataset) if dataset else title
    return SizeCurve(title, drawn, y.less) if drawn else None


def _axes(table: Table, x: str, y: str) -> tuple[ScoreColumn, ScoreColumn]:
    by_key = {column.key: column for column in table.columns}
    return by_key.get(x, by_key["seconds"]), by_key.get(y, table.columns[0])


def _seconds_left(found: list[Job]) -> float | None:
    """Until all have ended, in sequence: progress of running jobs, and estimates of waiting ones."""
    if not any(job.status in OPEN for job in found):
        return None
    total = 0.0
    for job in found:
        predicted = (job.estimate or {}).get("seconds") or 0.0
        total += (job.seconds_left if job.seconds_left is not None else predicted) if job.status == "running" else 0.0
        total += predicted if job.status == "queued" else 0.0
    return total


def _lines(table: Table) -> list[dict[str, Any]]:
    """The rows with every value formatted, and the best of each column marked."""
    found = []
    for number, row in enumerate(table.rows, 1):
        cells = [
            {
                "title": gettext(column.title),
                "text": write(row[column.key], column.unit),
                "predicted": write(row[column.predicted], column.unit) if column.predicted else "",
                "best": row["job"] in table.winners[column.key],
                "note": _ability_note(row) if column.key == "forgetting" else "",
            }
            for column in table.columns
        ]
        found.append({**row, "number": number, "url": f"/jobs/{row['job']}", "cells": cells})
    return found


def _ability_note(row: dict[str, Any]) -> str:
    """`dropped, 95%: −4.0% to −0.3%, removable`: the change of general ability with the adapter on."""
    between = ability_interval(row)
    adapter = is_number(row["forgetting"]) and row["strategy"] in STRATEGIES and STRATEGIES[row["strategy"]].adapter
    verdict, removable = ABILITY.get(row["verdict"], row["verdict"] or ""), gettext("removable") if adapter else ""
    return ", ".join(part for part in (gettext(verdict), between, removable) if part)


def ability_interval(row: dict[str, Any]) -> str:
    """`95%: −4.0% to −0.3%`, the lower end first; empty where it was not measured."""
    if not row["interval"]:
        return ""
    return gettext("95%%: %(low)s to %(high)s", low=ability(row["interval"][1]), high=ability(row["interval"][0]))


def _scatter(table: Table, x: ScoreColumn, y: ScoreColumn) -> Picture | None:
    dots = [
        Dot(row[x.key], row[y.key], number, f"{row['title']}: {write(row[y.key], y.unit)}, {write(row[x.key], x.unit)}", _best(table, row))
        for number, row in enumerate(table.rows, 1)
        if is_number(row[x.key]) and is_number(row[y.key])
    ]
    return charts.picture(dots, _scale(x), _scale(y))


def _curve(table: Table) -> Picture | None:
    score = table.columns[0]
    dots = [
        Dot(row["data_fraction"], row[score.key], number, _of_the_rows(row["data_fraction"], write(row[score.key], score.unit)))
        for number, row in enumerate(table.rows, 1)
        if row["status"] == "succeeded" and is_number(row[score.key])
    ]
    base = table.base.get(score.key)
    share = Scale(gettext("Share of the training rows"), lambda v: human_percent(v, 0), amount=True)
    return charts.picture(dots, share, _scale(score), joined=True, base=base if is_number(base) else None)


def _of_the_rows(share: float, score: str) -> str:
    return gettext("%(share)s of the rows: %(score)s", share=human_percent(share, 0), score=score)


def _scale(column: ScoreColumn) -> Scale:
    return Scale(gettext(column.title), lambda v: write(v, column.unit) if v else "0", amount=column.unit in ("bytes", "seconds", "count"))


def _best(table: Table, row: dict[str, Any]) -> bool:
    return row["job"] in table.winners[table.columns[0].key]
