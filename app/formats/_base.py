"""The base class of dataset formats: detection, validation, and normalization of rows.

A format never sees a file: the readers (`app/datasets/readers/`) pass it raw rows, one dict each, and a *mapping* from the
format's fields to the columns of this file. Columns no field claims are kept as metadata.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

from app.formats._conversions import Conversion
from app.formats._rows import Row as Row  # re-exported for the formats
from app.formats._rows import RowShape
from app.kit.json_safe import DEEPEST, finite, too_deep
from app.objectives import DEFAULT
from app.objectives._base import Kinds

Severity = Literal["error", "warning", "note"]
MAX_NAME_LENGTH = 300
"""Characters of a column's name: a longer one is a cell in the header by mistake. Every finding about a message repeats it."""
Columns = Mapping[str, str]
"""Field of the format → column of the file."""


class Field(NamedTuple):
    """One field of a format. `synonyms` are column names people use for it, best first, in lower case.

    `holds` says which kind of column is suggested for it where no name matches (`_content.py`); empty for none.
    """

    name: str
    help: str
    synonyms: tuple[str, ...]
    required: bool = True
    holds: Literal["", "text", "label", "question", "answer", "rating", "turns"] = ""


class RowFinding(NamedTuple):
    """One issue of one row. An `error` excludes the row; a `warning` or `note` does not. `column` is a path into the row, as
    `messages[2].content`. `fix` is `{label, operation, arguments}`."""

    rule: str
    message: str
    column: str | None = None
    value: str | None = None
    severity: Severity = "error"
    fix: dict[str, Any] | None = None


class Guess(NamedTuple):
    """How well a format fits the first rows: `score` 0 to 1, the mapping, the reason in words, and the share of valid rows."""

    score: float
    mapping: dict[str, str]
    reason: str
    good: float = 1.0


class Format(RowShape, ABC):
    """One dataset format. A subclass in `app/formats/NAME.py` is registered by being there; the format whose name is a shape owns it."""

    name: ClassVar[str]
    title: ClassVar[str]
    task: ClassVar[str] = DEFAULT  # the objective of its rows
    shape: ClassVar[str]  # shape of its normalized rows: its own name, or the name of the format that owns the shape
    summary: ClassVar[str]  # one sentence
    example: ClassVar[Row]  # one valid raw row, shown in the help and checked by the tests
    fields: ClassVar[tuple[Field, ...]]
    place: ClassVar[int] = 100  # order in lists, and which format wins a tie
    model_kinds: ClassVar[Kinds | None] = None  # suitable kinds of models, where they differ from those of its objective

    conversions: ClassVar[Mapping[str, Conversion]] = {}  # shape → conversion of its rows to that shape
    columns: ClassVar[Mapping[str, str]] = {}  # field → key of a normalized row, where the names differ
    checked_as: ClassVar[str | None] = None  # the format that validates a normalized row typed by a person, where it is another one

    file_columns: ClassVar[Mapping[str, str] | None] = None  # field → column in the output of `file_row`; None: the same names

    @property
    def file_mapping(self) -> dict[str, str]:
        """The mapping that parses the output of `file_row`; an empty name keeps a field from being detected among the metadata."""
        own = {field.name: field.name if field.name in self.keys else "" for field in self.fields}
        return dict(self.file_columns) if self.file_columns is not None else own

    def file_row(self, row: Row) -> Row:
        """A normalized row as a row of a file, without its metadata: the inverse of `normalise`."""
        return {key: row[key] for key in (*self.keys, "tools") if key in row}

    def identity(self, row: Row) -> dict[str, str]:
        """The mapping that parses a normalized row as a row of this format."""
        own = {field.name: field.name for field in self.fields if field.name in row}
        return own | {field: column for field, column in self.columns.items() if column in row}

    def tuned_kind(self, kind: str) -> str:
        """The kind of a model of `kind` after training on such rows."""
        return kind

    def guess_mapping(self, columns: Sequence[str]) -> dict[str, str]:
        """The best column for each field by its synonyms; each column is used once."""
        by_name = {plain(column): column for column in reversed(columns) if len(column) <= MAX_NAME_LENGTH}
        mapping: dict[str, str] = {}
        for field in self.fields:
            for synonym in field.synonyms:
                column = by_name.get(synonym)
                if column is not None and column not in mapping.values():
                    mapping[field.name] = column
                    break
        return mapping

    def recognise(self, rows: Sequence[Row]) -> Guess | None:
        """How well this format fits the first rows of a file; None when a required field has no column."""
        columns = columns_of(rows)
        mapping = self.guess_mapping(columns)
        missing = [f.name for f in self.fields if f.required and f.name not in mapping]
        if missing or not rows:
            return None
        good = sum(not any(f.severity == "error" for f in self.check(row, mapping)) for row in rows) / len(rows)
        claimed = len(set(mapping.values())) / max(1, len(columns))
        named = ", ".join(f"“{column}”" for column in mapping.values())
        columns_of_it = "Columns" if len(mapping) > 1 else "Column"
        reason = f"{columns_of_it} {named}; {good:.0%} of {len(rows)} sampled rows match."
        # The share of valid rows decides; among formats that fit equally well, the one that explains more columns.
        return Guess(0.2 + 0.6 * good + 0.2 * claimed, mapping, reason, good)

    @abstractmethod
    def check(self, row: Row, mapping: Columns) -> list[RowFinding]:
        """All issues of one raw row, in reading order; empty when it is valid."""

    @abstractmethod
    def normalise(self, row: Row, mapping: Columns) -> Row:
        """The normalized row. Only called when `check` found no error."""

    def metadata(self, row: Row, mapping: Columns) -> Row:
        """The columns that no field claims."""
        claimed = set(mapping.values())
        return {key: value for key, value in row.items() if key not in claimed}


def plain(column: str) -> str:
    """A column name in lower case, without spaces and surrounding underscores: `Human Message ` → `human_message`."""
    return column.strip().lower().replace(" ", "_").replace("-", "_")


def columns_of(rows: Iterable[Row]) -> list[str]:
    """Every column of these rows, in the order first seen."""
    return list(dict.fromkeys(key for row in rows for key in row))


def shown(value: object, limit: int = 200) -> str:
    """A value as a short line of text for a finding: safe to store and to show."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = text[: limit + 1].encode("utf-8", "backslashreplace").decode()
    text = "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
    return text if len(text) <= limit else text[:limit] + "…"


def around(text: str, found: re.Match[str]) -> str:
    """A match in a text, with some characters of context."""
    return text[max(0, found.start() - 30) : found.end() + 30]


def fingerprint(text: str) -> int:
    """A 64-bit hash of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def fix(label: str, operation: str, **arguments: Any) -> dict[str, Any]:
    """The one-click fix of a finding."""
    return {"label": label, "operation": operation, "arguments": arguments}


def text_of(row: Row, column: str | None) -> str | None:
    """The text in a column; numbers and booleans are converted, a missing one is None."""
    value = row.get(column) if column is not None else None
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        return str(value)
    return None


def check_text(row: Row, column: str | None, field: str, *, empty: Severity | None = "error", rule: str = "empty") -> list[RowFinding]:
    """Check a column that must hold text. `empty` is the severity of an empty one; None allows it."""
    at = column or field
    value = row.get(at)
    if value is None or (isinstance(value, str) and not value.strip()):
        if empty is None:
            return []
        return [RowFinding(rule, f"“{at}” is empty.", at, "", empty, fix("Remove row", "drop_row"))]
    if text_of(row, at) is None:
        kind = "a list" if isinstance(value, list) else "an object"
        return [
            RowFinding("wrong_shape", f"“{at}” must be text, but holds {kind}.", at, shown(value), "error", fix("Remove row", "drop_row"))
        ]
    return []


def parsed(value: Any) -> Any:
    """A list that a CSV or Parquet cell contains as JSON text; other values unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            inner = _cell.decode(value.strip())
        except (ValueError, RecursionError):
            return value
        return value if value.count("[") + value.count("{") > DEEPEST and too_deep(inner) else inner
    return value


_cell = json.JSONDecoder(parse_constant=lambda name: None, parse_float=finite)
