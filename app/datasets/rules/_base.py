"""The base class of rules, and their view of a row."""

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
"""Rows that a rule keeps something of; those beyond are not compared. 480 bytes of signature each: about 200 MB."""

Say = Callable[[int | None, Finding], None]


MAX_WORDS = 20_000
"""Words of a prompt, or of an answer, that are compared."""


class Seen(NamedTuple):
    """One valid row: its line, its texts with their paths, and the lower-case words of prompt and answer.

    The system message is excluded: it is often the same in every row. Of a passage, and of a labeled text, all words are the
    prompt; the label is the answer.
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
    """The text before the answer, without the system message, and the answer or answers."""
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
    """The text of messages, including tools' names and arguments."""
    return "\n".join(f"{message['content']} {calls_of(message)}".strip() for message in messages)


def calls_of(message: Row) -> str:
    """The tool calls of a message as text; empty where there are none."""
    return json.dumps(message["tool_calls"], ensure_ascii=False) if message.get("tool_calls") else ""


def _words(text: str) -> list[str]:
    return [found.group() for found in itertools.islice(WORD.finditer(text.lower()), MAX_WORDS)]


class Rule(ABC):
    """One rule. `say(line, finding)` reports, with no line for what is about all rows; `task` is that of the dataset."""

    def __init__(self, say: Say, task: str) -> None:
        self.say, self.task = say, task

    @abstractmethod
    def see(self, seen: Seen) -> None:
        """Look at one row."""

    def finish(self) -> None:
        """Report what only all rows together show."""
        return
