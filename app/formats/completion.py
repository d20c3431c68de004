"""Completion: a prompt and its continuation."""

from __future__ import annotations

from typing import ClassVar

from app.formats._base import Columns, Field, Format, Row, RowFinding, check_text, text_of
from app.formats._conversions import Conversion, single, turns
from app.formats._rows import PromptAndCompletion
from app.languages import mark

_TURNS = "each prompt becomes the user's turn and its completion the assistant's"


class Completion(PromptAndCompletion, Format):
    name: ClassVar = "completion"
    title: ClassVar = mark("Completion")
    shape: ClassVar = "completion"
    summary: ClassVar = mark("A prompt and the text that goes on from it, with no roles. The completion is trained on.")
    example: ClassVar = {"prompt": "Once upon a time,", "completion": " a fox found a violin."}
    fields: ClassVar = (
        Field("prompt", mark("The text that is given."), ("prompt", "source", "input_text"), holds="question"),
        Field(
            "completion",
            mark("The text that follows it."),
            ("completion", "response", "output", "target", "continuation", "target_text"),
            holds="answer",
        ),
    )
    place: ClassVar = 30
    conversions: ClassVar = {
        "chat": Conversion(_TURNS, True, turns),
        "instruction": Conversion(
            f"{_TURNS}; rows without a prompt are excluded", False, lambda row: [made for one in turns(row) for made in single(one)]
        ),
    }

    def check(self, row: Row, mapping: Columns) -> list[RowFinding]:
        findings = check_text(row, mapping.get("prompt"), "prompt", empty="note")
        return findings + check_text(row, mapping.get("completion"), "completion", rule="empty_answer")

    def normalise(self, row: Row, mapping: Columns) -> Row:
        return {"prompt": text_of(row, mapping["prompt"]) or "", "completion": text_of(row, mapping["completion"]) or ""}
