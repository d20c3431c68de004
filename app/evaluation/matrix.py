"""A matrix of a comparison: every base model and method in rows, every dataset in columns, a score with its interval in each cell.

Each column is a comparison of its own: its runs share training and validation rows, so the best of a column is marked where it is better
than all others beyond chance. Columns of different tasks have different scores.
"""

from __future__ import annotations

import uuid
from typing import Any, NamedTuple

from sqlalchemy.orm import Session

from app.evaluation import comparison_table, comparisons
from app.evaluation.comparison_table import Interval, ScoreColumn, Table, is_number
from app.jobs import row_losses
from app.kit import ids, stats
from app.tables import JSON, Comparison, Job


class MatrixColumn(NamedTuple):
    """One dataset: its table, and the score that its runs are judged by."""

    dataset_id: uuid.UUID
    name: str
    score: ScoreColumn
    table: Table
    jobs: list[Job]


class MatrixCell(NamedTuple):
    """One run: its row of the table, its score, the 95% interval of it, and whether it is the best of its column beyond chance."""

    row: JSON
    score: float | None
    interval: Interval | None
    best: bool


class MatrixRow(NamedTuple):
    """One base model with one method; a cell is None where no run was ordered or it was deleted."""

    model: str
    parameters: int
    title: str
    cells: list[MatrixCell | None]


class Matrix(NamedTuple):
    columns: list[MatrixColumn]
    rows: list[MatrixRow]


def matrix(session: Session, comparison: Comparison) -> Matrix:
    found = comparisons.jobs_of(session, comparison)
    columns = [_column(session, key, found) for key in dict.fromkeys(job.dataset_id for job in found)]
    cells: dict[tuple[str, str], dict[int, MatrixCell]] = {}
    sizes: dict[tuple[str, str], int] = {}
    for place, column in enumerate(columns):
        for job, row in zip(column.jobs, column.table.rows, strict=True):
            key = row["base_model"], row["title"]
            sizes[key] = row["parameters"]
            cells.setdefault(key, {})[place] = _cell(session, job, row, column)
    rows = [
        MatrixRow(model, sizes[model, title], title, [found.get(place) for place in range(len(columns))])
        for (model, title), found in cells.items()
    ]
    return Matrix(columns, rows)


def _column(session: Session, dataset_id: uuid.UUID, found: list[Job]) -> MatrixColumn:
    """The table of the runs on one dataset. Several base models are judged by what does not depend on a tokenizer."""
    own = [job for job in found if job.dataset_id == dataset_id]
    table = comparison_table.table_of(session, own)
    return MatrixColumn(dataset_id, own[0].spec["dataset"]["name"], table.columns[0], table, own)


def _cell(session: Session, job: Job, row: JSON, column: MatrixColumn) -> MatrixCell:
    score = row[column.score.key]
    known = score if is_number(score) else None
    best = row["job"] in column.table.winners[column.score.key]
    return MatrixCell(row, known, interval_of(session, job, column.score.key, known) if known is not None else None, best)


def interval_of(session: Session, job: Job, metric: str, score: float) -> Interval | None:
    """The 95% interval of a run's own score over its validation rows; None while it is not known.

    A share follows from the number of rows (Wilson). A loss is a ratio of nats to tokens over rows of different length, so its interval is
    that of the rows' deviations from it (linearized ratio estimator, Cochran 1977, section 6.4). Bits per byte are nats of the same rows in
    another unit, and are as certain in proportion.
    """
    evaluation = job.evaluation or {}
    told = ((evaluation.get("tuned") or {}).get("intervals") or {}).get(metric)
    if told:
        return told[0], told[1]
    if metric in ("accuracy", "reward_accuracy", "rating_accuracy") and evaluation.get("rows"):
        return stats.wilson(score * evaluation["rows"], evaluation["rows"])
    if metric not in ("loss", "bits_per_byte"):
        return None
    rows = [entry for entry in row_losses.read(session, job) if entry.held_out]
    tokens = sum(entry.tokens for entry in rows)
    if len(rows) < 2 or not tokens:
        return None
    loss = sum(entry.after * entry.tokens for entry in rows) / tokens
    low, high = stats.spread([(entry.after - loss) * entry.tokens * len(rows) / tokens for entry in rows])
    return (score * (1 + low / loss), score * (1 + high / loss)) if loss > 0 else None


def to_json(session: Session, comparison: Comparison) -> JSON:
    """The `matrix` of a comparison of `/v1/comparisons`."""
    found = matrix(session, comparison)
    return {
        "columns": [
            {"dataset_id": ids.public(ids.DATASET, one.dataset_id), "name": one.name, "score": one.score.key, "title": one.score.title, "less": one.score.less}
            for one in found.columns
        ],
        "rows": [
            {"model": row.model, "parameters": row.parameters, "title": row.title, "cells": [_cell_json(cell) for cell in row.cells]}
            for row in found.rows
        ],
    }  # fmt: skip


def _cell_json(cell: MatrixCell | None) -> dict[str, Any] | None:
    if cell is None:
        return None
    return {"job": cell.row["job"], "status": cell.row["status"], "score": cell.score, "interval": cell.interval, "best": cell.best}
