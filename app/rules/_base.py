"""What a rule is, and what it is shown of a row."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

from app.formats import Finding
from app.formats._base import Row

WORD = re.compile(r"\w+")
MOST_ROWS = 400_000
"""Rows a rule remembers something of; those beyond are not compared. 256 bytes of signature each: about 100 MB."""

Say = Callable[[int, Finding], None]


MOST_WORDS = 2000


class Seen(NamedTuple):
    """One good row: its line, its texts with their places, what is given and learnt in it, and its first words in lower case."""

    line: int
    row: Row
    texts: list[tuple[str, str]]
    prompt: str
    answer: str
    words: list[str]


def seen(line: int, row: Row, texts: list[tuple[str, str]], prompt: str, answer: str) -> Seen:
    words = [word for _, text in texts for word in WORD.findall(text.lower())]
    return Seen(line, row, texts, prompt, answer, words[:MOST_WORDS])


class Rule(ABC):
    """One rule. `say(line, finding)` reports; `task` is that of the dataset."""

    def __init__(self, say: Say, task: str) -> None:
        self.say, self.task = say, task

    @abstractmethod
    def see(self, seen: Seen) -> None:
        """Look at a row as it goes by."""

    def finish(self) -> None:
        """Say what only all rows together show."""
        return
