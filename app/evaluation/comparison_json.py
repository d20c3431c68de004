"""A comparison as the API answers it."""

from __future__ import annotations

from sqlalchemy.orm import Session

from app.evaluation import comparison_table, comparisons, matrix
from app.kit import ids
from app.tables import JSON, Comparison


def to_json(session: Session, comparison: Comparison) -> JSON:
    """A `comparison` of `/v1/comparisons`."""
    found = comparison_table.table(session, comparison)
    says = comparison_table.more_data(session, found) if comparison.kind == "learning_curve" else None
    return {
        "id": ids.public(ids.COMPARISON, comparison.id),
        "object": "comparison",
        "created_at": int(comparison.created_at.timestamp()),
        "name": comparison.name,
        "kind": comparison.kind,
        "status": comparisons.status_of([row["status"] for row in found.rows]),
        "model": comparison.order.get("model"),
        "models": comparison.order.get("models") or [comparison.order["model"]],
        "dataset_ids": [
            ids.public(ids.DATASET, key) for key in dict.fromkeys(job.dataset_id for job in comparisons.jobs_of(session, comparison))
        ],
        "score": found.columns[0].key,
        "columns": [column._asdict() for column in found.columns],
        "data": found.rows,
        "base": found.base,
        "bases": found.bases,
        "winners": found.winners,
        "refused": comparison.refused,
        "says": says._asdict() if says else None,
        "matrix": matrix.to_json(session, comparison) if comparison.kind == "matrix" else None,
    }
