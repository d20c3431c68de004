"""The loss ledger: each training row's mean loss before training and at its end, written beside the result.

A row that stays hard while the others got easy is often wrong or mislabelled; the data room sorts by it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from worker.batches import Tokenised

FILE = "ledger.json"
"""As `app/ledger.py` looks for it; this process does without the database that stands behind that file."""


def write(attempt: Path, data: Tokenised, before: list[float], after: list[float]) -> None:
    """Both sides of every row, in nats per learnt token (or per text). Nothing is written where one of them is not finite."""
    if not all(map(math.isfinite, before + after)):
        return
    from app.files import write_atomically  # it knows the database, which is slow to import and needed by nothing else here

    tokens = [int(data.trained[start:end].sum()) or 1 for start, end in zip(data.starts[:-1], data.starts[1:], strict=True)]
    rounded = {"before": [round(x, 5) for x in before], "after": [round(x, 5) for x in after]}
    write_atomically(attempt / FILE, json.dumps({"line": data.lines, **rounded, "tokens": tokens}))
