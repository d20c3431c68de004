"""Classification: a text and its label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from app.formats._base import Columns, Field, Format, Guess, Row, RowFinding, check_text, fix, shown, text_of
from app.formats._conversions import Conversion
from app.formats._rows import with_rest
from app.languages import mark


class Classification(Format):
    name: ClassVar = "classification"
    title: ClassVar = mark("Classification")
    task: ClassVar = "classification"
    shape: ClassVar = "classification"
    summary: ClassVar = mark("A text and the class it belongs to.")
    example: ClassVar = {"text": "My card was declined.", "label": "card"}
    fields: ClassVar = (
        Field(
            "text",
            mark("The text to classify."),
            ("text", "sentence", "content", "review", "utterance", "question", "tweet", "message", "comment"),
            holds="text",
        ),
        Field(
            "label",
            mark("Its class."),
            ("label", "category", "class", "intent", "target", "sentiment", "topic", "labels", "label_text", "tag"),
            holds="label",
        ),
    )
    place: ClassVar = 50
    keys: ClassVar = ("text", "label")
    conversions: ClassVar = {
        "completion": Conversion(
            "the text becomes the prompt and the label its completion",
            True,
            lambda row: [with_rest(row, {"prompt": row["text"], "completion": row["label"]})],
        )
    }

    def recognise(self, rows: Sequence[Row]) -> Guess | None:
        guess = super().recognise(rows)
        if guess is None:
            return None
        labels = [text_of(row, guess.mapping["label"]) or "" for row in rows]
        long = sum(len(label) > 120 for label in labels)
        # A label is short. A column of long texts named “target” holds answers, not classes; a few may be mistakes.
        return None if long > 0.1 * len(labels) else guess

    def check(self, row: Row, mapping: Columns) -> list[RowFinding]:
        findings = check_text(row, mapping.get("text"), "text")
        column = mapping.get("label", "label")
        label: Any = row.get(column)
        if isinstance(label, float) and not label.is_integer():
            text = "A label must be a name or a whole number; numbers to predict are not supported."
            return [*findings, RowFinding("wrong_label", text, column, shown(label), "error", fix("Remove row", "drop_row"))]
        findings += check_text(row, column, "label", rule="no_label")
        if isinstance(label, str) and "\0" in label:
            text = "The label holds a NUL character, which no database can store. Remove it."
            return [*findings, RowFinding("wrong_label", text, column, shown(label), "error", fix("Remove row", "drop_row"))]
        if isinstance(label, str) and len(label) > 200:
            findings.append(
                RowFinding("wrong_label", "A label of more than 200 characters is hardly a class.", column, shown(label), "warning")
            )
        return findings

    def normalise(self, row: Row, mapping: Columns) -> Row:
        return {"text": text_of(row, mapping["text"]) or "", "label": label_of(row, mapping["label"])}

    # Its rows: a text model reads the text alone; the label is the target.

    def render(self, row: Row) -> Row:
        return {"text": row["text"]}

    def label(self, row: Row) -> str | None:
        label: str = row["label"]
        return label

    def compared(self, row: Row) -> tuple[str, str]:
        return row["text"], row["label"]

    def contradiction(self, row: Row, before: int) -> tuple[str, str, bool]:
        return "other_label", f"Line {before} has the same input and another label.", True

    def asked_and_trained(self, row: Row) -> tuple[str, str]:
        return row["text"], row["label"]

    def before_answer(self, row: Row) -> list[Row]:
        return [{"role": "user", "content": row["text"]}] if row["text"] else []

    def solved(self, row: Row) -> tuple[str, str, list[Row]]:
        return str(row["text"]), str(row["label"]), []


def label_of(row: Row, column: str) -> str:
    """The label in a column, as it is in a normalized row."""
    label: Any = row.get(column)
    name = str(int(label)) if isinstance(label, float) and label.is_integer() else (text_of(row, column) or "")
    return name.strip()
