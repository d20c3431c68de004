"""Rated answers: one answer to a prompt, and whether it was good. These are the rows of KTO (Ethayarajh et al. 2024,
https://arxiv.org/abs/2402.01306)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from app.formats._base import Columns, Field, Format, Guess, Row, RowFinding, fix, parsed, shown
from app.formats._conversions import Conversion, answer_of, as_it_is
from app.formats._messages import as_messages, check_messages, normalise_messages
from app.formats._prompt import FIELDS, NOT_GUESSED, PROMPT, prompt_of
from app.formats._rows import given_and_all, last_of, said, texts_of, trained, with_rest, without_system
from app.formats.preference import conversation_with
from app.languages import mark

GOOD = {"true", "1", "yes", "good", "up", "thumbs_up", "like", "desirable", "+1"}
BAD = {"false", "0", "no", "bad", "down", "thumbs_down", "dislike", "undesirable", "-1"}
DROP = fix("Remove row", "drop_row")


class Rated(Format):
    name: ClassVar = "rated"
    title: ClassVar = mark("Rated answers")
    task: ClassVar = "kto"
    shape: ClassVar = "rated"
    summary: ClassVar = mark("A prompt, one answer to it, and whether that answer was good: true or false, as KTO takes it.")
    example: ClassVar = {"prompt": "Thank the customer.", "completion": "ok thx", "label": False}
    fields: ClassVar = (
        Field("prompt", mark("The prompt, as text or messages."), PROMPT, holds="question"),
        Field(
            "completion",
            mark("The answer. If omitted, it is the last message of the prompt's conversation."),
            ("completion", "response", "output", "answer"),
            False,
            "answer",
        ),
        Field(
            "label",
            mark("Whether the answer was good: true or false."),
            ("label", "kto_tag", "rating", "liked", "good", "thumb", "feedback"),
            holds="rating",
        ),
        *FIELDS,
    )
    place: ClassVar = 45
    keys: ClassVar = ("messages", "answer", "good")
    columns: ClassVar = {"prompt": "messages", "completion": "answer", "label": "good"}
    conversations: ClassVar = True
    file_columns: ClassVar = {"prompt": "prompt", "completion": "completion", "label": "label", **NOT_GUESSED}
    conversions: ClassVar = {
        "chat": Conversion(
            "answers rated good are kept, the others go", False, lambda row: answer_of(row, "answer") if row["good"] else []
        ),
        "preference": Conversion(
            "a good and a bad answer to the same prompt become a pair; answers without a counterpart go", False, as_it_is, paired=True
        ),
    }

    def recognise(self, rows: Sequence[Row]) -> Guess | None:
        guess = super().recognise(rows)
        if guess is None:
            return None
        column, prompt = guess.mapping["label"], guess.mapping["prompt"]
        # The columns of other formats may have these names too; only a boolean next to a whole exchange makes this format.
        rated = sum(verdict(row.get(column)) is not None for row in rows)
        exchange = "completion" in guess.mapping or any(isinstance(parsed(row.get(prompt)), list) for row in rows)
        return guess._replace(score=min(1.0, guess.score + 0.2)) if exchange and rated > 0.5 * len(rows) else None

    def check(self, row: Row, mapping: Columns) -> list[RowFinding]:
        at, column = mapping.get("label", "label"), mapping.get("prompt", "prompt")
        if row.get(at) is None:
            return [RowFinding("no_label", f"“{at}” is empty.", at, "", "error", DROP)]
        if verdict(row[at]) is None:
            return [RowFinding("wrong_label", f"“{at}” must be true or false.", at, shown(row[at]), "error", DROP)]
        try:
            result = self.normalise(row, mapping)
        except (KeyError, TypeError, IndexError, AttributeError):
            text = "The prompt and the answer must be text or lists of messages."
            return [RowFinding("wrong_shape", text, column, shown(row.get(column)), "error", DROP)]
        answer = mapping.get("completion", column)
        if not any(message["content"].strip() or message.get("tool_calls") for message in result["answer"]):
            return [RowFinding("empty_answer", f"“{answer}” holds no answer to rate.", answer, "", "error", DROP)]
        if not result["messages"]:
            return [RowFinding("empty", "There is no prompt before the answer.", column, "", "error", DROP)]
        findings = check_messages(result["messages"], column, answer=False) + check_messages(result["answer"], answer, answer=False)
        if not any(finding.severity == "error" for finding in findings) and result["answer"][-1]["role"] != "assistant":
            role = shown(result["answer"][-1]["role"])
            findings.append(
                RowFinding("wrong_role_order", "The answer must end with the assistant's message.", answer, role, "error", DROP)
            )
        return findings

    def normalise(self, row: Row, mapping: Columns) -> Row:
        prompt, tools = prompt_of(row, mapping)
        if "completion" in mapping:
            answer = as_messages(row.get(mapping["completion"]), "assistant")
        else:
            prompt, answer = prompt[:-1], prompt[-1:]
        good = verdict(row[mapping["label"]])
        rated: Row = {"messages": normalise_messages(prompt), "answer": normalise_messages(answer), "good": good is True}
        return rated | ({"tools": tools} if tools else {})

    def file_row(self, row: Row) -> Row:
        made = {"prompt": row["messages"], "completion": row["answer"], "label": row["good"]}
        return made | ({"tools": row["tools"]} if row.get("tools") else {})

    # Its rows: two rows contradict each other if one answer is rated good and bad.

    def render(self, row: Row) -> Row:
        return with_rest(row, {"messages": [*row["messages"], *row["answer"]]})

    def sequences(self, row: Row, kind: str) -> list[Row]:
        return [conversation_with(row, "answer", kind)]

    def texts(self, row: Row) -> Iterator[tuple[str, str]]:
        for key in ("messages", "answer"):
            yield from texts_of(key, row[key])

    def turns(self, row: Row) -> Sequence[Row]:
        found: Sequence[Row] = row["messages"]
        return found

    def label(self, row: Row) -> str | None:
        return "good" if row["good"] else "bad"

    def compared(self, row: Row) -> tuple[str, str]:
        return json.dumps([row["messages"], row["answer"]], ensure_ascii=False), str(row["good"])

    def contradiction(self, row: Row, before: int) -> tuple[str, str, bool]:
        text = f"Line {before} calls the same answer {'bad' if row['good'] else 'good'}. One of the two is wrong."
        return "opposite_verdict", text, True

    def question(self, row: Row) -> str:
        return last_of(row["messages"])

    def asked_and_trained(self, row: Row) -> tuple[str, str]:
        return said(without_system(row["messages"])), said(row["answer"])

    def given_and_all(self, row: Row) -> tuple[str, str]:
        return given_and_all(row["messages"], [*row["messages"], *row["answer"]])

    def before_answer(self, row: Row) -> list[Row]:
        found: list[Row] = row["messages"]
        return found

    def exchange(self, row: Row) -> dict[str, str] | None:
        """The exchange of a good answer; a bad one is no reference."""
        made = self.render(row) if row["good"] else row
        return trained(made).exchange(made)


def verdict(value: Any) -> bool | None:
    """A rating as a boolean; None for what is no rating."""
    word = str(value).strip().lower().replace(" ", "_") if isinstance(value, str | bool | int | float) else ""
    word = word.removesuffix(".0") if isinstance(value, float) else word
    return True if word in GOOD else False if word in BAD else None
