"""Divides the entries of an answer: its text becomes reasoning, content and tool calls, by the syntax that its worker found."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from app.answer_syntax._splitter import CallPiece, Part, Said, Splitter, Thought
from app.inference.protocol import AnswerStarted, ChoiceFinished, Entry, ReasoningPart, TextPart, ToolCallPart


class Division:
    """The division of one request's stream. Entries of an answer whose syntax is not known are passed on as they are.

    Log-probabilities stay with the text of the entry that they came in, and with no text where all of it is reasoning or a call.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]] = ()) -> None:
        self.tools = tools
        self.started: AnswerStarted | None = None
        self.splitters: dict[int, Splitter] = {}
        self.calls: Counter[int] = Counter()
        self.tokens: Counter[int] = Counter()

    def take(self, entries: list[Entry]) -> list[Entry]:
        return [part for entry in entries for part in self._divided(entry)]

    def _divided(self, entry: Entry) -> list[Entry]:
        if isinstance(entry, AnswerStarted):
            self.started = entry
        syntax = self.started.syntax if self.started else None
        if syntax is None or not isinstance(entry, TextPart | ChoiceFinished):
            return [entry]
        splitter = self.splitters.setdefault(entry.index, Splitter(syntax, self.tools))
        if isinstance(entry, ChoiceFinished):
            return [*self._entries(entry.index, splitter.end()), entry]
        self.tokens[entry.index] = entry.tokens
        found = self._entries(entry.index, splitter.push(entry.text))
        text = next((part for part in found if isinstance(part, TextPart)), None)
        if text is not None:
            text.logprobs = entry.logprobs
        elif entry.logprobs:
            found.append(TextPart(index=entry.index, text="", tokens=entry.tokens, logprobs=entry.logprobs))
        return found

    def _entries(self, index: int, parts: list[Part]) -> list[Entry]:
        return [self._entry(index, part) for part in parts]

    def _entry(self, index: int, part: Part) -> Entry:
        tokens = self.tokens[index]
        if isinstance(part, Said):
            return TextPart(index=index, text=part.text, tokens=tokens)
        if isinstance(part, Thought):
            return ReasoningPart(index=index, text=part.text, tokens=tokens)
        if isinstance(part, CallPiece) and part.name is None:
            return ToolCallPart(index=index, place=self.calls[index] - 1, arguments=part.arguments, tokens=tokens)
        place = self.calls[index]
        self.calls[index] += 1
        return ToolCallPart(index=index, place=place, id=call_id(), name=part.name, arguments=part.arguments, tokens=tokens)


def call_id() -> str:
    return f"call_{secrets.token_hex(12)}"
