"""The registry of dataset formats: the folder itself. One file per format, one class per file.

A *normalized row* is a dict of one of these shapes; it is what the Parquet file of a dataset holds and what the trainer reads, so
no code outside this folder knows which keys a person's file used:

    chat            {"messages": [{"role", "content", "weight"?: 0|1, "name"?, "tool_calls"?}, …], "tools"?: […]}
    instruction     {"messages": [system?, user, assistant]}
    completion      {"prompt": str, "completion": str}
    plain_text      {"text": str}
    preference      {"messages": […], "chosen": [message, …], "rejected": [message, …], "tools"?: […]}
    rated           {"messages": […], "answer": [message, …], "good": bool}
    classification  {"text": str, "label": str}

A shape belongs to the format of its name, which says what is asked of its rows (`app/formats/_rows.py`): their texts, their question,
how a text model reads them. A format with a new shape needs no edit elsewhere. Any row may carry "metadata": {column: value} with the columns that no field of the format claimed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from app.errors import BadField
from app.formats import _base, _content
from app.formats._base import Field, Format, Guess, Row, RowFinding
from app.formats.rated import verdict
from app.kit.registry import classes_in
from app.languages import gettext
from app.objectives import OBJECTIVES, Objective

__all__ = [
    "FORMATS",
    "Field",
    "Format",
    "Guess",
    "Row",
    "RowFinding",
    "asks",
    "conversations",
    "get",
    "objectives_of",
    "of",
    "rank",
    "suggest",
]


FORMATS: dict[str, Format] = {cls.name: cls() for cls in sorted(classes_in(__name__, Format), key=lambda cls: (cls.place, cls.name))}
"""Every format by name, in the order lists show them."""


def get(name: str) -> Format:
    """A format by its name. Raises BadField that lists the names."""
    try:
        return FORMATS[name]
    except KeyError:
        hint = gettext("Choose one of %(formats)s.", formats=", ".join(FORMATS))
        raise BadField(gettext("There is no format “%(name)s”.", name=name[:80]), hint=hint, param="format") from None


_OWNERS = sorted((entry for entry in FORMATS.values() if entry.name == entry.shape), key=lambda entry: -len(entry.keys))
_KEYS = [(frozenset(entry.keys), entry) for entry in _OWNERS]


def of(row: Row) -> Format:
    """The format that owns the shape of a normalized row: the one of whose keys the row has the most; plain text where none
    matches."""
    return next((entry for keys, entry in _KEYS if keys <= row.keys()), FORMATS["plain_text"])


def asks(name: str | None) -> bool:
    """Whether rows of a format have a prompt; True while the format is unknown."""
    return name is None or get(name).asks


def conversations(name: str | None) -> bool:
    """Whether rows of a format are rendered with a chat template by every model; True while the format is unknown."""
    return name is None or get(name).conversations


def objectives_of(name: str) -> list[Objective]:
    """The objectives that train on rows of a format, the format's own first."""
    own = OBJECTIVES[get(name).task]
    return [own, *(found for found in OBJECTIVES.values() if name in found.formats and found is not own)]


def suggest(rows: Sequence[Row]) -> tuple[str | None, dict[str, dict[str, str]]]:
    """Suggestions for a person to confirm: the format these rows look like, and the likeliest mapping for each format."""
    return _content.suggest(FORMATS, rows)


MIN_GOOD = 0.1
"""Below this share of valid rows a format does not fit, however many columns it claims."""
RATINGS = {*FORMATS["rated"].fields[2].synonyms, "thumbs_up", "is_good", "desirable"}


def rank(rows: Sequence[Row]) -> list[tuple[Format, Guess]]:
    """The formats that fit these rows, best first; the lower `place` wins a tie.

    A format whose columns another claims too, with more, is ranked after it: rows invalid there are findings, and here they would
    be trained on silently. One that trains on every answer never comes first where a column says which answers are bad.
    """
    guesses = [(entry, guess) for entry in FORMATS.values() if (guess := entry.recognise(rows)) is not None]
    claims = [set(guess.mapping.values()) for _, guess in guesses if guess.good >= MIN_GOOD]

    def order(pair: tuple[Format, Guess]) -> tuple[bool, float]:
        return any(set(pair[1].mapping.values()) < claimed for claimed in claims), -pair[1].score

    ranked = sorted(guesses, key=order)
    while ranked and OBJECTIVES[ranked[0][0].task].copies and judging(rows, ranked[0][1].mapping.values()):
        ranked.pop(0)
    return ranked


def judging(rows: Sequence[Row], claimed: Iterable[str] = ()) -> list[str]:
    """Columns beyond the claimed ones that seem to say which answers are bad: ratings, and worse answers."""
    taken = set(claimed)
    others = {column: _base.plain(column) for row in rows for column in row if column not in taken}

    def rates(column: str) -> bool:
        return sum(verdict(row.get(column)) is not None for row in rows) * 2 > len(rows)

    return [column for column, name in others.items() if name.startswith("rejected") or (name in RATINGS and rates(column))]
