"""Guesses which column holds what from its values and from hints in its name: for files whose header no format knows.

The result is only a suggestion. A person confirms it, because a wrong mapping would be trained on silently.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from app.formats._base import MAX_NAME_LENGTH, Format, Row, columns_of, parsed, plain, text_of
from app.formats._messages import is_sharegpt, is_turn

MAX_COLUMNS = 300
"""Maximum number of examined columns."""
MAX_LABEL_LENGTH = 60
HINTS = {
    "question": ("question", "frage", "pregunta", "domanda", "prompt", "query", "instruction", "request", "user", "customer", "kunde"),
    "answer": ("answer", "antwort", "respuesta", "réponse", "reponse", "risposta", "reply", "response", "output", "completion", "solution"),
    "label": ("label", "categor", "kategorie", "klasse", "class", "topic", "thema", "intent", "queue", "type", "typ", "tag", "sentiment", "team", "abteilung"),
}  # fmt: skip
"""Substrings of column names, in the languages of most exports."""
_WORD = re.compile(r"[^\W\d_]{2}")
_NO_PROSE = re.compile(r"https?://\S+|\S+@\S+\.\w+|[0-9a-fA-F-]{16,}|\d[\d.:/T -]*")


class ColumnStatistics(NamedTuple):
    """Statistics of a column's values. `place` is its position in the file."""

    name: str
    place: int
    text: bool
    label: bool
    rating: bool
    turns: str
    length: float
    asks: float

    def hinted(self, kind: str) -> bool:
        return any(hint in plain(self.name) for hint in HINTS[kind])


def suggest(formats: Mapping[str, Format], rows: Sequence[Row]) -> tuple[str | None, dict[str, dict[str, str]]]:
    """The format that the values look like, None where no column holds text, and the likeliest mapping for every format."""
    names = [name for name in columns_of(rows) if len(name) <= MAX_NAME_LENGTH][:MAX_COLUMNS]
    columns = [_measure(name, place, rows) for place, name in enumerate(names)]
    return _format_of(columns), {name: _mapping(entry, columns) for name, entry in formats.items()}


def _measure(name: str, place: int, rows: Sequence[Row]) -> ColumnStatistics:
    from app.formats.rated import verdict

    values = [row.get(name) for row in rows]
    talks = [turns for value in values if isinstance(turns := parsed(value), list) and turns and all(map(is_turn, turns))]
    texts = [text.strip() for row in rows if (text := text_of(row, name)) and text.strip()]
    wordy = sum(_WORD.search(text) is not None and not _NO_PROSE.fullmatch(text) for text in texts)
    kinds, count = len(set(texts)), max(1, len(texts))
    short = bool(texts) and max(map(len, texts)) <= MAX_LABEL_LENGTH
    column = ColumnStatistics(
        name=name,
        place=place,
        text=wordy * 2 > len(texts) and not talks,
        label=False,
        rating=kinds == 2 and all(verdict(text) is not None for text in texts),
        turns="" if len(talks) * 2 <= len(rows) else "sharegpt" if is_sharegpt(talks[0][0]) else "chat",
        length=sum(map(len, texts)) / count,
        asks=sum(text.endswith("?") for text in texts) / count,
    )
    repeats = 1 < kinds < 0.7 * count
    return column._replace(label=short and (repeats or (kinds > 1 and column.hinted("label"))))


def _format_of(columns: Sequence[ColumnStatistics]) -> str | None:
    turns = next((column.turns for column in columns if column.turns), None)
    if turns:
        return turns
    prose = [column for column in columns if column.text and not column.label]
    labels = [column for column in columns if column.label]
    if len(prose) > 1 and any(column.rating for column in columns):
        return "rated"
    if len(prose) > 1 and (not labels or any(column.hinted("answer") or column.asks > 0.3 for column in prose)):
        return "instruction"
    if prose and labels:
        return "classification"
    return "plain_text" if any(column.text for column in columns) else None


def _mapping(entry: Format, columns: Sequence[ColumnStatistics]) -> dict[str, str]:
    """By name first, the rest by content; each column is used once."""
    mapping = entry.guess_mapping([column.name for column in columns])
    for field in entry.fields:
        free = [column for column in columns if column.name not in mapping.values()]
        found = _best(field.holds, free) if field.holds and field.name not in mapping else None
        if found is not None:
            mapping[field.name] = found.name
    return {field.name: mapping[field.name] for field in entry.fields if field.name in mapping}


def _best(holds: str, free: Sequence[ColumnStatistics]) -> ColumnStatistics | None:
    """The column whose values fit a field best."""
    if holds == "turns":
        return next((column for column in free if column.turns), None)
    if holds == "rating":
        return next((column for column in free if column.rating), None)
    if holds == "label":
        able = [column for column in free if column.label]
        return max(able, key=lambda column: (column.hinted("label"), column.text, column.place), default=None)
    able = [column for column in free if column.text]
    if holds == "question":  # a question precedes its answer
        return max(able, key=lambda c: (not c.label, not c.hinted("answer"), c.hinted("question"), c.asks > 0.3, -c.place), default=None)
    if holds == "answer":
        return max(able, key=lambda c: (not c.label, c.hinted("answer"), c.asks <= 0.3, c.length), default=None)
    return max(able, key=lambda column: (not column.label, column.length), default=None)
