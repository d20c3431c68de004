"""Whether the answer matches a regular expression, in a time that grows with the text and not with the expression.

The engine is RE2 (in pyarrow), which has no backtracking: an expression that would need it is refused when the grader is saved.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from app.errors import BadField
from app.graders._base import JSON, GradedSample, Grader, Result, Steps
from app.graders._re2 import fault_of, matches
from app.graders._templates import Template, fill
from app.languages import gettext, mark


class RegexGrader(Grader):
    place: ClassVar = 80
    title: ClassVar = mark("Regular expression")
    summary: ClassVar = mark("The answer matches a regular expression.")
    example: ClassVar = {"input": "{{sample.output_text}}", "pattern": r"^\d{4}-\d{2}-\d{2}$"}
    ours: ClassVar = True

    type: Literal["regex"]
    input: Template = Field("{{sample.output_text}}", description=mark("The text that is graded."))
    pattern: str = Field(min_length=1, max_length=2000, description=mark("In RE2's syntax: without look-around and backreferences."))
    ignore_case: bool = Field(False, description=mark("Without regard to case."))

    def prove(self) -> None:
        if reason := fault_of(self.pattern):
            said = gettext("The expression is not valid: %(reason)s.", reason=reason)
            raise BadField(said, hint=gettext("RE2 knows no look-around and no backreferences."), param="grader.pattern")

    def steps(self, sample: GradedSample, item: JSON) -> Steps:
        yield from ()
        return Result(float(matches(self.pattern, fill(self.input, sample, item), ignore_case=self.ignore_case)))
