"""A judge that gives a label."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from app.graders._base import JSON, GradedSample, GradeError, Result, Steps
from app.graders._judge import Judge, result_in
from app.kit.answers import label_in
from app.languages import gettext, mark

Label = Annotated[str, StringConstraints(min_length=1, max_length=100)]


class LabelModelGrader(Judge):
    place: ClassVar = 45
    title: ClassVar = mark("Judge, label")
    summary: ClassVar = mark("A model reads the answer and gives it a label; some labels pass.")
    example: ClassVar = {
        "model": "",
        "input": [
            {"role": "user", "content": "Is this answer correct?\n\nReference: {{item.reference}}\nAnswer: {{sample.output_text}}"}
        ],
        "labels": ["correct", "wrong"],
        "passing_labels": ["correct"],
    }  # fmt: skip

    type: Literal["label_model"]
    labels: tuple[Label, ...] = Field(min_length=2, max_length=50, description=mark("The labels that the judge chooses from."))
    passing_labels: tuple[Label, ...] = Field(min_length=1, max_length=50, description=mark("The labels that count 1; the others count 0."))

    @model_validator(mode="after")
    def _known(self) -> Self:
        if unknown := [label for label in self.passing_labels if label not in self.labels]:
            raise ValueError(f"the passing label {unknown[0]!r} is none of the labels")
        return self

    def steps(self, sample: GradedSample, item: JSON) -> Steps:
        instruction = f"Answer with one of these labels and nothing else: {', '.join(self.labels)}."
        reply = yield self.ask(self.messages(sample, item, instruction))
        found = result_in(reply.text)
        label = label_in(found if isinstance(found, str) else reply.text, self.labels)
        if label not in self.labels:
            said = gettext("The judge gave none of the labels: %(text)s", text=repr(reply.text[:200]))
            raise GradeError("model_grader_parse_error", said)
        return Result(float(label in self.passing_labels), tokens={reply.model or self.model: reply.tokens})
