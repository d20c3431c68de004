"""Preference: two answers to one prompt, and which of them is better."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import ClassVar

from app.formats._base import Columns, Field, Format, Guess, Row, RowFinding, fix, shown
from app.formats._conversions import Conversion, answer_of
from app.formats._messages import as_messages, check_messages, normalise_messages
from app.formats._prompt import FIELDS, NOT_GUESSED, PROMPT, prompt_of
from app.formats._rows import given_and_all, last_of, said, texts_of, with_rest, without_system
from app.languages import mark

DROP = fix("Remove row", "drop_row")


class Preference(Format):
    name: ClassVar = "preference"
    title: ClassVar = mark("Preference")
    task: ClassVar = "preference"
    shape: ClassVar = "preference"
    summary: ClassVar = mark("A prompt with a better and a worse answer. The model is trained to prefer the better one.")
    example: ClassVar = {"prompt": "Thank the customer.", "chosen": "Thank you, that helps us a lot.", "rejected": "ok thx"}
    fields: ClassVar = (
        Field("prompt", mark("The prompt, as text or messages; OpenAI's “input” is understood too."), PROMPT, False, "question"),
        Field(
            "chosen",
            mark("The better answer, as text or messages."),
            ("chosen", "preferred_output", "preferred", "accepted", "chosen_response", "chosen_text", "response", "text", "output"),
            holds="answer",
        ),
        Field(
            "rejected",
            mark("The worse answer, as text or messages."),
            ("rejected", "non_preferred_output", "dispreferred", "rejected_response", "rejected_text", "rejected_output"),
            holds="answer",
        ),
        *FIELDS,
    )
    place: ClassVar = 40
    keys: ClassVar = ("messages", "chosen", "rejected")
    columns: ClassVar = {"prompt": "messages"}
    conversations: ClassVar = True
    file_columns: ClassVar = {
        "prompt": "input",
        "chosen": "preferred_output",
        "rejected": "non_preferred_output",
        "tools": "",
        **NOT_GUESSED,
    }
    conversions: ClassVar = {
        "chat": Conversion("the better answer is kept and the worse one goes", False, lambda row: answer_of(row, "chosen")),
        "rated": Conversion(
            "each pair becomes two rows, one rated good and one rated bad",
            True,
            lambda row: [
                with_rest(row, {"messages": row["messages"], "answer": row[key], "good": key == "chosen"}) for key in ("chosen", "rejected")
            ],
        ),
    }

    def recognise(self, rows: Sequence[Row]) -> Guess | None:
        guess = super().recognise(rows)
        # No other format has a chosen and a rejected column, so their presence outweighs any other similarity.
        return guess and guess._replace(score=min(1.0, guess.score + 0.2))

    def check(self, row: Row, mapping: Columns) -> list[RowFinding]:
        findings: list[RowFinding] = []
        for name in ("chosen", "rejected"):
            findings += _check_answer(row, mapping.get(name, name))
        if any(finding.severity == "error" for finding in findings):
            return findings
        try:
            result = self.normalise(row, mapping)
        except (KeyError, TypeError, IndexError, AttributeError):
            at = mapping.get("prompt", "prompt")
            return [
                *findings,
                RowFinding("wrong_shape", "The prompt must be text or a list of messages.", at, shown(row.get(at)), "error", DROP),
            ]
        if not result["messages"]:
            return [RowFinding("empty", "There is no prompt before the two answers.", mapping.get("prompt", "prompt"), "", "error", DROP)]
        findings += check_messages(result["messages"], mapping.get("prompt", "prompt"), answer=False)
        if result["chosen"] == result["rejected"]:
            text = "The two answers are equal, so there is nothing to prefer."
            findings.append(RowFinding("same_answers", text, mapping.get("rejected"), shown(row[mapping["rejected"]]), "error", DROP))
        return findings

    def normalise(self, row: Row, mapping: Columns) -> Row:
        messages, tools = prompt_of(row, mapping)
        better, worse = (as_messages(row[mapping[name]], "assistant") for name in ("chosen", "rejected"))
        if not messages:  # both answers hold the whole conversation: their common prefix is the prompt
            shared = _shared(better, worse)
            messages, better, worse = better[:shared], better[shared:], worse[shared:]
        result: Row = {
            "messages": normalise_messages(messages),
            "chosen": normalise_messages(_after(messages, better)),
            "rejected": normalise_messages(_after(messages, worse)),
        }
        if tools:
            result["tools"] = tools
        return result

    def file_row(self, row: Row) -> Row:
        asked = {"messages": row["messages"]} | (
            {"tools": row["tools"]} if row.get("tools") else {}
        )  # OpenAI's keys have a place for tools
        return {"input": asked, "preferred_output": row["chosen"], "non_preferred_output": row["rejected"]}

    # Its rows: two rows contradict each other if they prefer different answers.

    def render(self, row: Row) -> Row:
        return with_rest(row, {"messages": [*row["messages"], *row["chosen"]]})

    def sequences(self, row: Row, kind: str) -> list[Row]:
        return [conversation_with(row, answer, kind) for answer in ("chosen", "rejected")]

    def texts(self, row: Row) -> Iterator[tuple[str, str]]:
        for key in self.keys:
            yield from texts_of(key, row[key])

    def turns(self, row: Row) -> Sequence[Row]:
        found: Sequence[Row] = row["messages"]
        return found

    def compared(self, row: Row) -> tuple[str, str]:
        better, worse = (json.dumps(row[key], ensure_ascii=False) for key in ("chosen", "rejected"))
        return json.dumps([row["messages"], *sorted((better, worse))], ensure_ascii=False), better

    def contradiction(self, row: Row, before: int) -> tuple[str, str, bool]:
        text = f"Line {before} ranks the same two answers the other way round. One of the two is wrong."
        return "opposite_verdict", text, True

    def question(self, row: Row) -> str:
        return last_of(row["messages"])

    def asked_and_trained(self, row: Row) -> tuple[str, str]:
        return said(without_system(row["messages"])), said([*row["chosen"], *row["rejected"]])

    def given_and_all(self, row: Row) -> tuple[str, str]:
        return given_and_all(row["messages"], [*row["messages"], *row["chosen"]])

    def before_answer(self, row: Row) -> list[Row]:
        found: list[Row] = row["messages"]
        return found


def conversation_with(row: Row, answer: str, kind: str = "dialogue") -> Row:
    """A normalized row as one conversation that ends with its answer “chosen”, “rejected” or, of a rated row, “answer”; only that
    has a loss.

    A model of kind “generic” continues the plain text, as in the playground: no roles, and no system message.
    """
    if kind == "generic":
        asked = [message for message in row["messages"] if message.get("role") != "system"]
        return {"prompt": _words(asked), "completion": _words(row[answer])}
    prompt = [{**message, "weight": 0} if message.get("role") == "assistant" else message for message in row["messages"]]
    return {"messages": [*prompt, *row[answer]], **({"tools": row["tools"]} if row.get("tools") else {})}


def _words(messages: Sequence[Row]) -> str:
    return "".join(message.get("content") or "" for message in messages)


def _check_answer(row: Row, column: str) -> list[RowFinding]:
    value = row.get(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        return [RowFinding("empty_answer", f"“{column}” is empty.", column, "", "error", DROP)]
    try:
        messages = as_messages(value, "assistant")
    except TypeError:
        return [RowFinding("wrong_shape", f"“{column}” must be text or a list of messages.", column, shown(value), "error", DROP)]
    findings = check_messages(messages, column, answer=False)
    if not findings and messages[-1]["role"] != "assistant":
        text = "An answer must end with the assistant's message."
        findings = [RowFinding("wrong_role_order", text, column, shown(messages[-1]["role"]), "error", DROP)]
    return findings


def _shared(a: list[Row], b: list[Row]) -> int:
    """Number of equal messages at the start of both, the last answers excluded."""
    count = 0
    while count < min(len(a), len(b)) - 1 and a[count] == b[count]:
        count += 1
    return count


def _after(prompt: list[Row], answer: list[Row]) -> list[Row]:
    """An answer without the prompt, which some files repeat in front of it."""
    return answer[len(prompt) :] if len(answer) > len(prompt) and answer[: len(prompt)] == prompt else answer
