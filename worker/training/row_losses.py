"""The loss ledger: the mean loss of each training and held-out row before training and at its end, written beside the result.

A row that stays hard while the others got easy is often wrong or mislabelled; the data room sorts by it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from app.storage.atomic import write_atomically
from worker.data.batching import Tokenised

FILE = "ledger.json"
"""As `app/jobs/row_losses.py` looks for it; this process does without the database that stands behind that file."""


class LossPart(NamedTuple):
    """Rows and both sides of each, in nats per learnt token (or per text, or per pair). Of held-out rows the first may be all."""

    rows: Tokenised
    before: list[float]
    after: list[float]
    held_out: bool = False


def write(attempt: Path, parts: Sequence[LossPart]) -> None:
    """Nothing is written where a loss is not finite."""
    if not all(math.isfinite(loss) for part in parts for loss in (*part.before, *part.after)):
        return

    columns: dict[str, list[Any]] = {"line": [], "before": [], "after": [], "tokens": [], "held_out": []}
    for rows, before, after, held_out in parts:
        count = min(len(before), len(after))
        spans = zip(rows.starts[:count], rows.starts[1 : count + 1], strict=True)
        columns["line"] += rows.lines[:count]
        columns["before"] += [round(loss, 5) for loss in before[:count]]
        columns["after"] += [round(loss, 5) for loss in after[:count]]
        columns["tokens"] += [int(rows.trained[start:end].sum()) or 1 for start, end in spans]
        columns["held_out"] += [held_out] * count
    write_atomically(attempt / FILE, json.dumps(columns))
