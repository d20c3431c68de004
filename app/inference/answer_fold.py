"""What one model has answered so far, folded from the entries of its stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from app.inference.protocol import (
    AnswerStarted,
    ChoiceFinished,
    Done,
    Entry,
    Logprob,
    ReasoningPart,
    StreamError,
    TextPart,
    ToolCallPart,
)


@dataclass
class Choice:
    """One answer so far. `calls` are its tool calls as the API sends them."""

    text: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    finish_reason: str | None = None
    tokens: int = 0
    reasoning_tokens: int = 0

    def take_call(self, entry: ToolCallPart) -> None:
        if entry.place >= len(self.calls):
            function = {"name": entry.name or "", "arguments": ""}
            self.calls.append({"id": entry.id, "type": "function", "function": function})
        self.calls[entry.place]["function"]["arguments"] += entry.arguments
        self.tokens = entry.tokens


@dataclass
class AnswerFold:
    """One model's answer so far, folded from the entries of its stream."""

    choices: dict[int, Choice] = field(default_factory=dict)
    started: AnswerStarted | None = None
    done: Done | None = None
    error: dict[str, Any] | None = None

    @classmethod
    def of(cls, entries: Sequence[Entry]) -> AnswerFold:
        heard = cls()
        heard.take(entries)
        return heard

    def take(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            match entry:
                case AnswerStarted():
                    self.started = entry
                case TextPart():
                    choice = self.choices.setdefault(entry.index, Choice())
                    choice.text += entry.text
                    choice.logprobs += entry.logprobs
                    choice.tokens = entry.tokens
                case ReasoningPart():
                    choice = self.choices.setdefault(entry.index, Choice())
                    choice.reasoning += entry.text
                    choice.tokens = choice.reasoning_tokens = entry.tokens
                case ToolCallPart():
                    self.choices.setdefault(entry.index, Choice()).take_call(entry)
                case ChoiceFinished():
                    choice = self.choices.setdefault(entry.index, Choice())
                    choice.finish_reason, choice.tokens = entry.reason, entry.tokens
                case Done():
                    self.done = entry
                case StreamError():
                    self.error = {"message": entry.message, "hint": entry.hint, "code": entry.code}

    def usage(self) -> dict[str, Any]:
        """Tokens in the shape of the OpenAI API; of an answer that was stopped, those received."""
        last = self.done or self.started
        prompt = last.prompt_tokens if last else 0
        written = self.done.completion_tokens if self.done else sum(c.tokens for c in self.choices.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
            "prompt_tokens_details": {"cached_tokens": self.done.cached_tokens if self.done else 0, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": sum(c.reasoning_tokens for c in self.choices.values()), "audio_tokens": 0},
        }
