"""The metrics of a job's steps as a CSV file, in the layout of OpenAI's result files."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from app import events as said
from app.ownership import maker_of
from app.storage import files
from app.tables import Event, Job

RESULT_COLUMNS = (
    "step", "epoch", "train_loss", "valid_loss", "learning_rate", "grad_norm", "tokens", "trained_tokens",
    "tokens_per_second", "memory_bytes", "seconds",
)  # fmt: skip


def results_csv(rows: Sequence[Event]) -> bytes:
    """Step metrics as CSV, one line per step. A step repeated after a crash counts once, the last time.

    Further metrics of a recipe follow in columns of their own, `train_…` and `valid_…`.
    """
    lines: dict[int, dict[str, Any]] = {}
    more: dict[str, None] = {}
    for row in rows:
        event = said.from_row(row.type, row.data)
        if isinstance(event, said.Started) and event.resumed_from is not None:
            lines = {step: line for step, line in lines.items() if step <= event.resumed_from}
        elif isinstance(event, said.Step):
            own = {f"train_{name}": value for name, value in event.metrics.items()}
            more |= dict.fromkeys(own)
            lines.setdefault(event.step, {}).update(event.model_dump(include=set(RESULT_COLUMNS)), train_loss=event.loss, **own)
        elif isinstance(event, said.Evaluated):
            own = {f"valid_{name}": value for name, value in event.metrics.items()}
            more |= dict.fromkeys(own)
            lines.setdefault(event.step, {"step": event.step}).update(valid_loss=event.loss, **own)
    out = io.StringIO()
    writer = csv.DictWriter(out, (*RESULT_COLUMNS, *more), restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(line for _, line in sorted(lines.items()))
    return out.getvalue().encode()


def write_results(session: Session, job: Job) -> None:
    """Store the step metrics as a file with the purpose fine-tune-results, in this transaction."""
    rows = session.scalars(
        select(Event).where(Event.job_id == job.id, Event.type.in_(("started", "step", "evaluated"))).order_by(Event.id)
    ).all()
    owner = maker_of(session, job)
    file = files.add_bytes(session, owner, results_csv(rows), f"step_metrics-{job.id.hex[:8]}.csv", files.RESULTS)
    session.flush()
    session.execute(update(Job).where(Job.id == job.id).values(result_file_id=file.id))
