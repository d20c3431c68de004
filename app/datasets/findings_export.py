"""Findings as downloads: CSV for a spreadsheet, JSON Lines for a program."""

from __future__ import annotations

import csv
import io
import json
import uuid
from collections.abc import Iterator

from sqlalchemy import select

from app.db import transaction
from app.tables import Finding

COLUMNS = ("line", "column", "rule", "severity", "message", "value", "fix")


def download(dataset_id: uuid.UUID, kind: str) -> Iterator[str]:
    """All findings in the order of their lines, in pieces. `kind` is csv or jsonl."""
    if kind == "csv":
        yield _csv_line(COLUMNS)
    with transaction() as session:
        query = select(Finding).where(Finding.dataset_id == dataset_id).order_by(Finding.line, Finding.id)
        for found in session.scalars(query.execution_options(yield_per=1000)):
            cells = (found.line, found.column, found.rule, found.severity, found.message, found.value, (found.fix or {}).get("label"))
            yield _csv_line(cells) if kind == "csv" else json.dumps(dict(zip(COLUMNS, cells, strict=True)), ensure_ascii=False) + "\n"


def _csv_line(cells: tuple[object, ...]) -> str:
    out = io.StringIO()
    csv.writer(out).writerow([guarded(cell) for cell in cells])
    return out.getvalue()


def guarded(cell: object) -> object:
    """Protects against formula injection: a text that begins like a formula gets an apostrophe in front."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell
