"""The base class of rules, and their view of a row."""

from __future__ import annotations

import itertools
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import NamedTuple

from app import formats
from app.formats import Format, RowFinding
from app.formats._base import Row
from app.objectives import OBJECTIVES

WORD = re.compile(r"\w+")
MAX_ROWS = 400_000
"""Maximum rows that a rule stores something of; those beyond are not compared. 480 bytes of signature each: about 200 MB."""

Say = Callable[[int | None, RowFinding], None]


MAX_WORDS = 20_000
"""Words of a prompt, or of an answer, that are compared."""


class Seen(NamedTuple):
    """One valid row: its line, its texts with their paths, and the lower-case words of prompt and answer.

    The system message is excluded: it is often the same in every row. Of a passage, and of a text with a label, all words count
    as the prompt; the label is the answer. `shape` is the format that owns the row, `json` the row as it is stored, where that is
    known.
    """

    line: int
    row: Row
    texts: list[tuple[str, str]]
    asked: list[str]
    trained: list[str]
    shape: Format
    json: str | None = None


def seen(line: int, row: Row, json: str | None = None) -> Seen:
    shape = formats.of(row)
    asked, trained = (_words(part) for part in shape.asked_and_trained(row))
    return Seen(line, row, list(shape.texts(row)), asked, trained, shape, json)


def _words(text: str) -> list[str]:
    return [found.group() for found in itertools.islice(WORD.finditer(text.lower()), MAX_WORDS)]


class Rule(ABC):
    """One rule. `say(line, finding)` reports an issue, with line None for one of the whole dataset; `entry` is the format that
    the dataset is parsed as, `mapping` the column of each of its fields."""

    def __init__(self, say: Say, entry: Format, mapping: Mapping[str, str]) -> None:
        self.say, self.entry, self.mapping = say, entry, mapping

    @property
    def classifies(self) -> bool:
        """Whether the rows are texts with a label."""
        return OBJECTIVES[self.entry.task].classifies

    @abstractmethod
    def see(self, seen: Seen) -> None:
        """Process one row."""

    def finish(self) -> None:
        """Report issues that only all rows together show."""
        return
