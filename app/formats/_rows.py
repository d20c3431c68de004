"""What a format knows of its normalised rows: their texts, what they ask, and how a text model reads them.

A text model trains on three shapes, which have their classes here: messages, a prompt with its completion, and text. Any other shape
says with `render` which of these it becomes, and everything else follows from that; a format overrides what it knows better.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

Row = dict[str, Any]


class RowShape:
    """What is asked of a row, whatever its format."""

    keys: ClassVar[tuple[str, ...]] = ()  # what every normalised row of this shape has; the most of them tell whose a row is
    asks: ClassVar[bool] = True  # a row asks something; of plain text everything is learnt
    conversations: ClassVar[bool] = False  # rows are written with the chat template by models of any kind

    def render(self, row: Row) -> Row:
        """The row as a text model trains on it: messages, a prompt and its completion, or text."""
        return row

    def sequences(self, row: Row, kind: str) -> list[Row]:
        """The rendered rows that a trainer makes of it for a model of `kind`; of a pair the better answer's first."""
        return [self.render(row)]

    def texts(self, row: Row) -> Iterator[tuple[str, str]]:
        """Every text that a model would see, with its place."""
        made = self.render(row)
        return trained(made).texts(made)

    def turns(self, row: Row) -> Sequence[Row]:
        """The messages whose roles a report counts."""
        return ()

    def label(self, row: Row) -> str | None:
        """What the row is counted under, where rows have labels or ratings."""
        return None

    def compared(self, row: Row) -> tuple[str, str]:
        """What two rows must share to be compared, and what they may then say differently about it; empty where nothing is asked."""
        made = self.render(row)
        return trained(made).compared(made)

    def contradiction(self, row: Row, before: int) -> tuple[str, str, bool]:
        """(rule, message, whether it is a warning) about a row that asks what line `before` asks, and says something else."""
        return "other_answer", f"Line {before} has the same input and another answer.", False

    def question(self, row: Row) -> str:
        """What it asks, as a finding shows it."""
        made = self.render(row)
        return trained(made).question(made)

    def asked_and_trained(self, row: Row) -> tuple[str, str]:
        """The text before the answer, without the system's message, and the answer or the answers."""
        made = self.render(row)
        return trained(made).asked_and_trained(made)

    def given_and_all(self, row: Row) -> tuple[str, str]:
        """What is given, and everything: by these a row of the validation set is recognised among the training rows."""
        made = self.render(row)
        return trained(made).given_and_all(made)

    def before_answer(self, row: Row) -> list[Row]:
        """The messages that a model is asked to answer; empty where there are none."""
        made = self.render(row)
        return trained(made).before_answer(made)

    def exchange(self, row: Row) -> dict[str, str] | None:
        """`{"system", "prompt", "reference"}` of the first question; None for a row that asks nothing, or needs tools."""
        made = self.render(row)
        return trained(made).exchange(made)

    def solved(self, row: Row) -> tuple[str, str, list[Row]]:
        """The last question, its answer, and the turns before the question."""
        made = self.render(row)
        return trained(made).solved(made)

    def about(self, row: Row) -> str:
        """The text by which rows are compared as vectors."""
        made = self.render(row)
        return trained(made).about(made)


class Messages(RowShape):
    """A conversation; what the assistant says is learnt."""

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
        return (words(messages[asked]), words(messages[last]), messages[:asked]) if asked >= 0 else ("", "", [])

    def about(self, row: Row) -> str:
        return (self.exchange(row) or {"prompt": ""})["prompt"]


class PromptAndCompletion(RowShape):
    """A prompt and how it goes on."""

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
    """A passage, all of which is learnt."""

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
    """The calls of a message as text; empty where there are none."""
    return json.dumps(message["tool_calls"], ensure_ascii=False) if message.get("tool_calls") else ""


def said(messages: Iterable[Row]) -> str:
    """What messages say, tools' names and arguments too."""
    return "\n".join(f"{message['content']} {calls_of(message)}".strip() for message in messages)


def without_system(messages: Iterable[Row]) -> list[Row]:
    return [message for message in messages if message["role"] != "system"]


def given_and_all(before: Sequence[Row], everything: Iterable[Row]) -> tuple[str, str]:
    return "\n".join(turn["content"] for turn in without_system(before)), "\n".join(turn["content"] for turn in everything)


def last_answer(messages: Sequence[Row], none: int) -> int:
    """The place of the assistant's last message; `none` where it says nothing."""
    return max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=none)


def last_of(messages: Sequence[Row]) -> str:
    return str(messages[-1]["content"]) if messages else ""


def words(turn: Row) -> str:
    content = turn.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def with_rest(row: Row, made: Row) -> Row:
    """`made` of a row, with its tools and metadata."""
    return made | {key: row[key] for key in ("tools", "metadata") if row.get(key)}


def _whole(found: dict[str, str]) -> dict[str, str] | None:
    return found if found["prompt"].strip() and found["reference"].strip() else None
