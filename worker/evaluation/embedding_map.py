"""A dataset's rows as a model embeds them: a two-dimensional map, and each row's nearest neighbors.

The map is the first two principal components of the unit vectors; neighbors are by cosine of the full vectors.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from app import formats
from app.evaluation.service import EvaluationSpec
from worker.data.batching import Row, read_rows
from worker.evaluation.predict import AT_ONCE, embedder
from worker.evaluation.scoring import Say, drawn
from worker.runtime.device import Compute

NEAREST = 6
SHOWN = 240  # characters of a row's text


def look(spec: EvaluationSpec, engine: Compute, say: Say) -> dict[str, Any]:
    rows = [(row, text) for row in drawn(read_rows(spec.dataset), spec.rows, spec.seed) if (text := text_of(row)).strip()]
    say(0.0, f"Loading {spec.model.name}")
    vectors_of, found = embedder(spec, engine), []
    for start in range(0, len(rows), AT_ONCE["embedding"]):
        say(start / len(rows), f"{start:,} of {len(rows):,} rows")
        found.append(vectors_of([text for _, text in rows[start : start + AT_ONCE["embedding"]]]))
    vectors = np.concatenate(found).astype(np.float64)
    places, shares = flat(vectors)
    near = vectors @ vectors.T
    np.fill_diagonal(near, -np.inf)
    most = min(NEAREST, len(rows) - 1)
    order = np.argsort(-near, axis=1)[:, :most]
    points = [
        {
            "line": row.line, "x": round(float(x), 4), "y": round(float(y), 4), "label": row.row.get("label"), "text": text[:SHOWN],
            "near": [[int(other), round(float(near[place, other]), 4)] for other in order[place]],
        }
        for place, ((row, text), (x, y)) in enumerate(zip(rows, places, strict=True))
    ]  # fmt: skip
    return {"rows": len(rows), "dimensions": int(vectors.shape[1]), "explained": shares, "points": points}


def text_of(row: Row) -> str:
    """What a row says: its text, or its first question."""
    return formats.of(row.row).about(row.row)


def flat(vectors: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """(rows, 2): the first two principal components, scaled to −1 to 1, and the share of the variance of each."""
    centered = vectors - vectors.mean(0)
    u, s, _ = np.linalg.svd(centered, full_matrices=False)
    places = np.zeros((len(vectors), 2))
    size = min(2, len(s))
    places[:, :size] = u[:, :size] * s[:size]
    whole = float((s**2).sum()) or 1.0
    shares = [float(s[i] ** 2 / whole) if i < len(s) else 0.0 for i in range(2)]
    return places / (np.abs(places).max() or 1.0), shares
