"""Whether the answer is JSON that a schema allows."""

from __future__ import annotations

import json
from typing import Any, ClassVar, Literal

from pydantic import Field

from app.errors import BadField
from app.graders._base import JSON, MAX_TEXT, GradedSample, GradeError, Grader, Result, Steps
from app.graders._schema import MAX_BYTES, MAX_STEPS, OutOfSteps, SchemaCheck, fault_in
from app.graders._templates import Template, fill
from app.kit.humanize import human_number
from app.languages import gettext, mark


class JsonSchemaGrader(Grader):
    place: ClassVar = 50
    title: ClassVar = mark("JSON schema")
    summary: ClassVar = mark("The answer is JSON that the schema allows.")
    example: ClassVar = {"schema": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}}
    ours: ClassVar = True

    type: Literal["json_schema"]
    input: Template = Field("{{sample.output_text}}", description=mark("The text that is graded."))
    schema_: dict[str, Any] = Field(alias="schema", description=mark("A JSON Schema; `pattern` is in RE2's syntax."))

    def prove(self) -> None:
        size = len(json.dumps(self.schema_))
        fault = fault_in(self.schema_) if size <= MAX_BYTES else ""
        if size > MAX_BYTES:
            fault = gettext("schema has %(size)s bytes; %(most)s is the most", size=human_number(size), most=human_number(MAX_BYTES))
        if fault:
            said = gettext("The schema cannot be used: %(fault)s.", fault=fault)
            raise BadField(said, hint=gettext("Simplify it."), param="grader.schema")

    def steps(self, sample: GradedSample, item: JSON) -> Steps:
        yield from ()
        text = fill(self.input, sample, item)
        try:
            value = GradedSample(text[: MAX_TEXT + 1]).output_json
        except GradeError:
            return Result(0.0, {"json": 0.0})
        try:
            return Result(float(SchemaCheck(self.schema_).fits(value)), {"json": 1.0})
        except OutOfSteps:
            said = gettext("To check the answer takes more than %(most)s steps.", most=human_number(MAX_STEPS))
            raise GradeError("other_error", said) from None
