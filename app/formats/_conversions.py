"""Conversions of rows from one shape to another, shared by the formats."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from app.formats._rows import Row, with_rest


class Conversion(NamedTuple):
    """A conversion of rows from one shape to another, described in words, and whether it is lossless. `turn` returns no row for
    one that cannot be converted, several where a row holds several. With `paired` many rows are converted together
    (`app/datasets/compose_rows.py`)."""

    words: str
    lossless: bool
    turn: Callable[[Row], list[Row]]
    paired: bool = False


def as_it_is(row: Row) -> list[Row]:
    return [row]


def turns(row: Row) -> list[Row]:
    asked = [{"role": "user", "content": row["prompt"]}] if row["prompt"].strip() else []
    return [with_rest(row, {"messages": [*asked, {"role": "assistant", "content": row["completion"]}]})]


def single(row: Row) -> list[Row]:
    """The row if it is one question and one answer, optionally after a system message."""
    roles = [message["role"] for message in row["messages"]]
    plain = roles in (["user", "assistant"], ["system", "user", "assistant"])
    trained = all(message.keys() == {"role", "content"} for message in row["messages"])  # no tool calls and no weights
    return [row] if plain and trained and not row.get("tools") else []


def prompt_and_completion(row: Row) -> list[Row]:
    if not single(row):
        return []
    prompt = "\n\n".join(message["content"] for message in row["messages"][:-1])
    return [with_rest(row, {"prompt": prompt, "completion": row["messages"][-1]["content"]})]


def answer_of(row: Row, key: str) -> list[Row]:
    """The conversation up to an answer; earlier answers have no loss, as in the pair it comes from."""
    before = [{**message, "weight": 0} if message["role"] == "assistant" else message for message in row["messages"]]
    return [with_rest(row, {"messages": [*before, *row[key]]})]
