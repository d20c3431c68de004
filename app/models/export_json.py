"""Exports as the API gives them."""

from __future__ import annotations

from app.errors import problem_json
from app.kit import ids
from app.tables import JSON, Export


def to_json(export: Export) -> JSON:
    """The export as the API gives it."""
    key, spec, there = ids.public(ids.EXPORT, export.id), export.spec, bool(export.files)
    return {
        "id": key,
        "object": "export",
        "model": spec["model"]["name"],
        "format": export.format,
        "types": spec["types"],
        "status": "succeeded" if there else export.status,
        "progress": 1.0 if there else export.progress,
        "stage": None if there else export.stage,
        "files": [{**file, "url": f"/v1/exports/{key}/files/{file['name']}"} for file in export.files],
        "parity": export.parity and _parity_json(export.parity),
        "error": problem_json(export.error),
        "hub": export.hub and _hub_json(export.hub, export),
        "created_at": int(export.created_at.timestamp()),
        "finished_at": int(export.finished_at.timestamp()) if export.finished_at else None,
    }


_UNKNOWN: JSON = {"answers": [], "same_answers": 0, "score": None, "verdict": ""}
"""What the table of an export of an earlier version does not say of a file."""


def _parity_json(parity: JSON) -> JSON:
    return {"answers": [], **parity, "lines": [{**_UNKNOWN, **line} for line in parity["lines"]]}


def _hub_json(push: JSON, export: Export) -> JSON:
    status = export.status if export.status in ("queued", "running") else push["status"]
    return {**push, "status": status, "progress": export.progress, "error": problem_json(push["error"])}
