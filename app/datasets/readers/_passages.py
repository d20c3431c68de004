"""Plain text: passages between blank lines, or lines, none longer than a trainer would take."""

from __future__ import annotations

import re
from collections.abc import Iterator

from app.datasets.readers import _base
from app.datasets.readers._base import Raw
from app.datasets.readers._bytes import chain, lines_of, text_of_line, too_long
from app.datasets.readers._repair import offer, windows_text
from app.formats._base import RowFinding, shown


def read_txt(chunks: Iterator[bytes]) -> Iterator[Raw]:
    """Passages between blank lines, or single lines where the file has no blank line near its start."""
    head = next(chunks, b"")
    by_paragraph = re.search(rb"\n[ \t\r]*\n", head.strip()) is not None
    start, parts, held = 1, list[str](), 0
    for number, line in lines_of(chain(head, chunks)):
        text = text_of_line(line) if line is not None else too_long()
        if isinstance(text, str) and "\0" in text:
            text = RowFinding("nul", "This line holds a NUL character. Remove it.", value=shown(text, 80))
        if isinstance(text, RowFinding):
            meant = windows_text(line) if line is not None and text.rule == "not_utf8" else None
            row = {"text": meant.strip()} if meant and meant.strip() else None
            yield Raw(number, None, offer(text, row), row)
            continue
        if parts and (not text.strip() or not by_paragraph or held > _base.MAX_PASSAGE_LENGTH):
            yield from _passages(start, "\n".join(parts))
            parts, held = [], 0
        if text.strip():
            if not parts:
                start = number
            parts.append(text.rstrip())
            held += len(text)
    if parts:
        yield from _passages(start, "\n".join(parts))


def _passages(line: int, text: str) -> Iterator[Raw]:
    """A passage, split at the end of a sentence or a word where it is longer than _base.MAX_PASSAGE_LENGTH."""
    at = 0
    while at < len(text):
        end = min(len(text), at + _base.MAX_PASSAGE_LENGTH)
        if end < len(text):
            cuts = [text.rfind(mark, at + _base.MAX_PASSAGE_LENGTH // 2, end) for mark in (". ", ".\n", "\n", " ")]
            end = next((cut + 1 for cut in cuts if cut > 0), end)
        piece = text[at:end].strip()
        if piece:
            yield Raw(line, {"text": piece})
        line, at = line + text.count("\n", at, end), end
