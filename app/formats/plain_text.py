"""Plain text: passages to continue, without question and answer."""

from __future__ import annotations

from typing import ClassVar

from app.formats._base import Columns, Field, Format, Row, RowFinding, check_text, text_of
from app.formats._rows import Text
from app.languages import mark


class PlainText(Text, Format):
    name: ClassVar = "plain_text"
    title: ClassVar = mark("Plain text")
    shape: ClassVar = "plain_text"
    summary: ClassVar = mark("Passages of text. Every token is trained on: the model picks up vocabulary and style.")
    example: ClassVar = {"text": "The bridge of a violin is carved from maple and held by the strings alone."}
    fields: ClassVar = (Field("text", mark("The passage."), ("text", "content", "document", "passage", "body", "story"), holds="text"),)
    place: ClassVar = 60
    model_kinds: ClassVar = ("generic", "instruction", "dialogue")

    def check(self, row: Row, mapping: Columns) -> list[RowFinding]:
        return check_text(row, mapping.get("text"), "text")

    def normalise(self, row: Row, mapping: Columns) -> Row:
        return {"text": text_of(row, mapping["text"]) or ""}
