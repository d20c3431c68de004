"""Whether the answer has the right length."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from app.graders._base import JSON, GradedSample, Grader, Result, Steps
from app.graders._templates import Template, fill
from app.languages import mark


class LengthGrader(Grader):
    place: ClassVar = 90
    title: ClassVar = mark("Length")
    summary: ClassVar = mark("The answer has at least and at most so many characters, words or lines.")
    example: ClassVar = {"input": "{{sample.output_text}}", "unit": "words", "max": 100}
    ours: ClassVar = True

    type: Literal["length"]
    input: Template = Field("{{sample.output_text}}", description=mark("The text that is graded."))
    unit: Literal["characters", "words", "lines"] = Field("characters", description=mark("What is counted."))
    min: int | None = Field(None, ge=0, description=mark("The fewest allowed."))
    max: int | None = Field(None, ge=0, description=mark("The most allowed."))

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.min is None and self.max is None:
            raise ValueError("give min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError("min is larger than max")
        return self

    def steps(self, sample: GradedSample, item: JSON) -> Steps:
        yield from ()
        text = fill(self.input, sample, item)
        count = len(text) if self.unit == "characters" else len(text.split() if self.unit == "words" else text.splitlines())
        inside = (self.min is None or count >= self.min) and (self.max is None or count <= self.max)
        return Result(float(inside), {self.unit: float(count)})
