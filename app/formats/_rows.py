"""The normalized rows of a format: their texts, prompts, and the sequences that a text model trains on.

A text model trains on three shapes, which have their classes here: messages, a prompt with its completion, and text. Any other
shape defines by `render` which of these it becomes, and everything else is derived; a format overrides what it can do better.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

from app.answer_syntax.hermes import with_calls

Row = dict[str, Any]


class RowShape:
    """Operations on a row, whatever its format."""

    keys: ClassVar[tuple[str, ...]] = ()  # keys of every normalized row of this shape; the shape with the most matching keys owns a row
    asks: ClassVar[bool] = True  # a row has a prompt; in plain text every token is trained
    conversations: ClassVar[bool] = False  # rows are rendered with the chat template by models of any kind

    def render(self, row: Row) -> Row:
        """The row as a text model trains on it: messages, a prompt and its completion, or text."""
        return row

    def sequences(self, row: Row, kind: str) -> list[Row]:
        """The rendered rows that a trainer makes of it for a model of `kind`; of a pair the preferred answer's first."""
        return [self.render(row)]

    def texts(self, row: Row) -> Iterator[tuple[str, str]]:
        """Every text that a model would see, with its path."""
        made = self.render(row)
        return trained(made).texts(made)

    def turns(self, row: Row) -> Sequence[Row]:
        """The messages whose roles a report counts."""
        return ()

    def label(self, row: Row) -> str | None:
        """The row's label or rating, if it has one."""
        return None

    def compared(self, row: Row) -> tuple[str, str]:
        """(what two rows must share to be compared, what they may then contradict each other in); empty for rows without a
        prompt."""
        made = self.render(row)
        return trained(made).compared(made)

    def contradiction(self, row: Row, before: int) -> tuple[str, str, bool]:
        """(rule, message, whether it is a warning) about a row with the same prompt as line `before` and another answer."""
        return "other_answer", f"Line {before} has the same input and another answer.", False

    def question(self, row: Row) -> str:
        """The prompt, as an issue shows it."""
        made = self.render(row)
        return trained(made).question(made)

    def asked_and_trained(self, row: Row) -> tuple[str, str]:
        """The prompt without the system message, and the answer or the answers."""
        made = self.render(row)
        return trained(made).asked_and_trained(made)

    def given_and_all(self, row: Row) -> tuple[str, str]:
        """The prompt, and all texts: by these a validation row is recognized among the training rows."""
        made = self.render(row)
        return trained(made).given_and_all(made)

    def before_answer(self, row: Row) -> list[Row]:
        """The messages before the answer; empty where there are none."""
        made = self.render(row)
        return trained(made).before_answer(made)

    def exchange(self, row: Row) -> dict[str, str] | None:
        """`{"system", "prompt", "reference"}` of the first question; None for a row without a prompt, or with tools."""
        made = self.render(row)
        return trained(made).exchange(made)

    def solved(self, row: Row) -> tuple[str, str, list[Row]]:
        """The last question, its answer, and the turns before the question."""
        made = self.render(row)
        return trained(made).solved(made)

    def about(self, row: Row) -> str:
        """The text whose embedding represents the row."""
        made = self.render(row)
        return trained(made).about(made)


class Messages(RowShape):
    """A conversation; the assistant's messages are trained."""

    keys: ClassVar = ("messages",)
    conversations: ClassVar = True

    def texts(self, row: Row) -> Iterator[tuple[str, str]]:
        return texts_of("messages", row["messages"])

    def turns(self, row: Row) -> Sequence[Row]:
        found: Sequence[Row] = row["messages"]
        return found

    def compared(self, row: Row) -> tuple[str, str]:
        *before, last = row["messages"]
        return json.dumps(before, ensure_ascii=False), last["content"] + calls_of(last)

    def question(self, row: Row) -> str:
        return last_of(row["messages"][:-1])

    def asked_and_trained(self, row: Row) -> tuple[str, str]:
        return said(without_system(row["messages"][:-1])), said(row["messages"][-1:])

    def given_and_all(self, row: Row) -> tuple[str, str]:
        return given_and_all(row["messages"][:-1], row["messages"])

    def before_answer(self, row: Row) -> list[Row]:
        messages: list[Row] = row["messages"]
        return messages[: last_answer(messages, len(messages))]

    def exchange(self, row: Row) -> dict[str, str] | None:
        turns = row["messages"]
        spoken = without_system(turns)
        if row.get("tools") or [turn["role"] for turn in spoken[:2]] != ["user", "assistant"]:
            return None
        system = next((words(turn) for turn in turns if turn["role"] == "system"), "")
        return _whole({"system": system, "prompt": words(spoken[0]), "reference": words(spoken[1])})

    def solved(self, row: Row) -> tuple[str, str, list[Row]]:
        messages: list[Row] = row["messages"]
        last = last_answer(messages, -1)
        asked = max((i for i, m in enumerate(messages[:last]) if m["role"] == "user"), default=-1) if last > 0 else -1
        if asked < 0:
            return "", "", []
        answer = words(messages[last])
        calls = messages[last].get("tool_calls")
        return words(messages[asked]), with_calls(answer, calls) if calls else answer, messages[:asked]

    def about(self, row: Row) -> str:
        return (self.exchange(row) or {"prompt": ""})["prompt"]


class PromptAndCompletion(RowShape):
    """A prompt and its completion."""

    keys: ClassVar = ("prompt", "completion")

    def texts(self, row: Row) -> Iterator[tuple[str, str]]:
        return ((key, row[key]) for key in self.keys)

    def compared(self, row: Row) -> tuple[str, str]:
        return row["prompt"], row["completion"]

    def question(self, row: Row) -> str:
        asked: str = row["prompt"]
        return asked

    def asked_and_trained(self, row: Row) -> tuple[str, str]:
        return row["prompt"], row["completion"]

    def given_and_all(self, row: Row) -> tuple[str, str]:
        return row["prompt"], f"{row['prompt']}\n{row['completion']}"

    def before_answer(self, row: Row) -> list[Row]:
        return [{"role": "user", "content": row["prompt"]}] if row["prompt"] else []

    def exchange(self, row: Row) -> dict[str, str] | None:
        return _whole({"system": "", "prompt": row["prompt"], "reference": row["completion"]})

    def solved(self, row: Row) -> tuple[str, str, list[Row]]:
        return row["prompt"], row["completion"].strip(), []

    def about(self, row: Row) -> str:
        asked: str = row["prompt"]
        return asked


class Text(RowShape):
    """A passage, all of which is trained."""

    keys: ClassVar = ("text",)
    asks: ClassVar = False

    def texts(self, row: Row) -> Iterator[tuple[str, str]]:
        return iter([("text", row["text"])])

    def compared(self, row: Row) -> tuple[str, str]:
        return "", ""

    def question(self, row: Row) -> str:
        passage: str = row["text"]
        return passage

    def asked_and_trained(self, row: Row) -> tuple[str, str]:
        return row["text"], ""

    def given_and_all(self, row: Row) -> tuple[str, str]:
        return "", row["text"]

    def before_answer(self, row: Row) -> list[Row]:
        return []

    def exchange(self, row: Row) -> dict[str, str] | None:
        return None

    def solved(self, row: Row) -> tuple[str, str, list[Row]]:
        return "", "", []

    def about(self, row: Row) -> str:
        return str(row["text"])


TRAINED = (Messages(), PromptAndCompletion(), Text())


def trained(row: Row) -> RowShape:
    """The shape of a rendered row."""
    return TRAINED[0] if "messages" in row else TRAINED[1] if "completion" in row else TRAINED[2]


# What rows with messages share ----------------------------------------------------------------------------------------


def texts_of(key: str, messages: Iterable[Row]) -> Iterator[tuple[str, str]]:
    for index, message in enumerate(messages):
        yield f"{key}[{index}].content", message["content"]
        if calls := calls_of(message):
            yield f"{key}[{index}].tool_calls", calls


def calls_of(message: Row) -> str:
    """The tool calls of a message as text; empty where there are none."""
    return json.dumps(message["tool_calls"], ensure_ascii=False) if message.get("tool_calls") else ""


def said(messages: Iterable[Row]) -> str:
    """The text of messages, including names and arguments of tools."""
    return "\n".join(f"{message['content']} {calls_of(message)}".strip() for message in messages)


def without_system(messages: Iterable[Row]) -> list[Row]:
    return [message for message in messages if message["role"] != "system"]


def given_and_all(before: Sequence[Row], everything: Iterable[Row]) -> tuple[str, str]:
    return "\n".join(turn["content"] for turn in without_system(before)), "\n".join(turn["content"] for turn in everything)


def last_answer(messages: Sequence[Row], none: int) -> int:
    """The index of the assistant's last message; `none` where it is empty."""
    return max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=none)


def last_of(messages: Sequence[Row]) -> str:
    return str(messages[-1]["content"]) if messages else ""


def words(turn: Row) -> str:
    content = turn.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def with_rest(row: Row, made: Row) -> Row:
    """`made` from a row, with its tools and metadata."""
    return made | {key: row[key] for key in ("tools", "metadata") if row.get(key)}


def _whole(found: dict[str, str]) -> dict[str, str] | None:
    return found if found["prompt"].strip() and found["reference"].strip() else None
