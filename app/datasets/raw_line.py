"""One line of a dataset's file as it is there, with all its problems, for a person who corrects it by hand.

Runs in a limited child, as parsing itself: `look(payload, say)`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from app import formats
from app.datasets import readers
from app.datasets.edits import Edits
from app.datasets.ingest import numbered
from app.datasets.readers import Raw
from app.kit.json_safe import storable

MAX_TEXT_LENGTH = 1 << 20
"""Maximum characters of a line that a form in a browser can hold."""


def look(payload: dict[str, Any], say: Any) -> dict[str, Any]:
    """`payload`: path, filename, format, mapping, edits and line. Returns `text`, None where the file has no such line or it is
    too long to be shown, and `problems`, each as a finding. This version's edits of the line are applied to the text."""
    line = payload["line"]
    raw = next(
        (raw for raw in numbered(readers.read(Path(payload["path"]), payload["filename"])) if raw.line >= line and _counts(raw)), None
    )
    if raw is None or raw.line > line:
        return {"text": None, "problems": []}
    entry, mapping = formats.get(payload["format"]), payload["mapping"]
    row, typed = Edits(payload["edits"]).apply(line, raw.row or {}, entry, mapping)
    if typed or row:
        text = json.dumps(typed or row, ensure_ascii=False, indent=2)
        problems = [] if typed else entry.check(row or {}, mapping)
    else:
        text, problems = storable(raw.text or ""), [raw.problem] if raw.problem else []
    return {"text": text if len(text) <= MAX_TEXT_LENGTH else None, "problems": [found._asdict() for found in problems]}


def _counts(raw: Raw) -> bool:
    """Whether it is a row, not a remark about the file."""
    return raw.row is not None or (raw.problem is not None and raw.problem.severity == "error")
