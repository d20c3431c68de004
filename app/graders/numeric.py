"""Whether the answer gives the right number."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field

from app.graders._base import JSON, GradedSample, GradeError, Grader, Result, Steps
from app.graders._templates import Template, fill
from app.kit.answers import number_in
from app.languages import gettext, mark


class NumericGrader(Grader):
    place: ClassVar = 70
    title: ClassVar = mark("Number")
    summary: ClassVar = mark("The last number of the answer equals that of the reference.")
    example: ClassVar = {"input": "{{sample.output_text}}", "reference": "{{item.reference}}", "tolerance": 0.0}
    ours: ClassVar = True

    type: Literal["numeric"]
    input: Template = Field("{{sample.output_text}}", description=mark("The text whose last number is graded."))
    reference: Template = Field(description=mark("A text whose last number is the right one."))
    tolerance: float = Field(0.0, ge=0, allow_inf_nan=False, description=mark("How far off it may be."))
    relative: float = Field(1e-6, ge=0, le=1, description=mark("How far off it may be as a share of the right number."))

    def steps(self, sample: GradedSample, item: JSON) -> Steps:
        yield from ()
        wanted = number_in(fill(self.reference, sample, item))
        if wanted is None:
            raise GradeError("invalid_variable_error", gettext("The reference has no number."))
        said = number_in(fill(self.input, sample, item))
        right = said is not None and math.isclose(said, wanted, rel_tol=self.relative, abs_tol=max(self.tolerance, 1e-9))
        return Result(float(right))
