"""The rows that readers yield, and size limits."""

from __future__ import annotations

from typing import NamedTuple

from app.formats._base import Row, RowFinding

MAX_LINE_BYTES = 16 << 20
"""A longer line, field or element is reported and skipped without being held in memory."""
MAX_PASSAGE_LENGTH = 4000
"""Plain text is split into passages of at most this many characters, so that max sequence lengths lose none of it."""
MAX_UNPACKED_BYTES = 64 << 30
MAX_RATIO = 200
CHUNK_BYTES = 1 << 20


class Raw(NamedTuple):
    """A row, or a problem, at a line (1-based; for Parquet, and inside one-line JSON, the record).

    `repaired` is the row that a line with a problem becomes when a person has it repaired; `text` is the line itself, for editing
    by hand.
    """

    line: int
    row: Row | None
    problem: RowFinding | None = None
    repaired: Row | None = None
    text: str | None = None
