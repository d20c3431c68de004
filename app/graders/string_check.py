"""Compares two texts, exactly or by whether one contains the other."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from app.graders._base import JSON, GradedSample, Grader, Result, Steps
from app.graders._templates import Template, fill
from app.languages import mark


class StringCheckGrader(Grader):
    place: ClassVar = 10
    title: ClassVar = mark("String check")
    summary: ClassVar = mark("The answer equals the reference, or contains it.")
    example: ClassVar = {"input": "{{sample.output_text}}", "operation": "eq", "reference": "{{item.reference}}"}

    type: Literal["string_check"]
    input: Template = Field(description=mark("The text that is graded."))
    operation: Literal["eq", "ne", "like", "ilike"] = Field(
        description=mark("eq: equal; ne: not equal; like: contains the reference; ilike: the same without regard to case.")
    )
    reference: Template = Field(description=mark("The text that it is compared with."))

    def steps(self, sample: GradedSample, item: JSON) -> Steps:
        yield from ()
        text, reference = fill(self.input, sample, item), fill(self.reference, sample, item)
        if self.operation == "like":
            return Result(float(reference in text))
        if self.operation == "ilike":
            return Result(float(reference.casefold() in text.casefold()))
        return Result(float((text == reference) == (self.operation == "eq")))
