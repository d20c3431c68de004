"""What a rule is, and what it is shown of a row."""

from __future__ import annotations

import itertools
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import NamedTuple

from app.formats import Finding
from app.formats._base import Row

WORD = re.compile(r"\w+")
MAX_ROWS = 400_000
"""Rows a rule remembers something of; those beyond are not compared. 480 bytes of signature each: about 200 MB."""

Say = Callable[[int | None, Finding], None]


MAX_WORDS = 20_000
"""Words of a prompt, or of an answer, that are compared."""


class Seen(NamedTuple):
    """One good row: its line, its texts with their places, and in lower case the words that are asked and those that are learnt.

    The system's message is left out: it is often the same in every row and says nothing of this one. Of a passage, and of a
    text with a label, all words are asked; a label is learnt.
    """

    line: int
    row: Row
    texts: list[tuple[str, str]]
    asked: list[str]
    learnt: list[str]


def seen(line: int, row: Row, texts: list[tuple[str, str]]) -> Seen:
    asked, learnt = (_words(part) for part in asked_and_learnt(row))
    return Seen(line, row, texts, asked, learnt)


def asked_and_learnt(row: Row) -> tuple[str, str]:
    """The text before the answer, without the system's message, and the answer or the answers."""
    if "messages" in row:
        before = row["messages"]
        answers = [message for key in ("chosen", "rejected", "answer") for message in row.get(key, ())]
        if not answers:
            before, answers = before[:-1], before[-1:]
        return _said(message for message in before if message["role"] != "system"), _said(answers)
    if "completion" in row:
        return row["prompt"], row["completion"]
    return row["text"], row.get("label") or ""


def _said(messages: Iterable[Row]) -> str:
    """What messages say, tools' names and arguments too."""
    return "\n".join(f"{message['content']} {calls_of(message)}".strip() for message in messages)


def calls_of(message: Row) -> str:
    """The calls of a message as text; empty where there are none."""
    return json.dumps(message["tool_calls"], ensure_ascii=False) if message.get("tool_calls") else ""


def _words(text: str) -> list[str]:
    return [found.group() for found in itertools.islice(WORD.finditer(text.lower()), MAX_WORDS)]


class Rule(ABC):
    """One rule. `say(line, finding)` reports, with no line for what is about all rows; `task` is that of the dataset."""

    def __init__(self, say: Say, task: str) -> None:
        self.say, self.task = say, task

    @abstractmethod
    def see(self, seen: Seen) -> None:
        """Look at a row as it goes by."""

    def finish(self) -> None:
        """Say what only all rows together show."""
        return
