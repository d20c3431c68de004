"""Whether the answer calls the right tool with the right arguments."""

from __future__ import annotations

import json
import math
from typing import Any, ClassVar, Literal

from pydantic import Field

from app.graders._base import JSON, GradedSample, GradeError, Grader, Result, Steps
from app.graders._templates import Template, fill


class ToolCallGrader(Grader):
    place: ClassVar = 60
    title: ClassVar = "Tool call"
    summary: ClassVar = "The answer calls the right tool with the right arguments, or no tool where none is needed."
    example: ClassVar = {"tool": "{{item.tool}}", "arguments": "{{item.arguments}}"}
    ours: ClassVar = True

    type: Literal["tool_call"]
    tool: Template = Field(description="The name of the right tool; empty where none must be called.")
    arguments: Template | None = Field(None, description="The right arguments, a JSON object; empty grades the tool alone.")
    match: Literal["exact", "subset"] = Field("exact", description="exact: no other arguments; subset: others are allowed.")

    def steps(self, sample: GradedSample, item: JSON) -> Steps:
        yield from ()
        wanted, calls = fill(self.tool, sample, item).strip(), sample.output_tools
        if not wanted:
            return Result(float(not calls))
        right = [call["function"] for call in calls if call["function"]["name"] == wanted]
        if self.arguments is None or not right:
            return Result(float(bool(right) and len(calls) == 1), {"tool": float(bool(right))})
        try:
            expected = json.loads(fill(self.arguments, sample, item))
        except (ValueError, RecursionError):
            raise GradeError("invalid_variable_error", "The right arguments are not JSON.") from None
        fitting = any(self._fits(call["arguments"], expected) for call in right)
        return Result(float(fitting and len(calls) == 1), {"tool": 1.0, "arguments": float(fitting)})

    def _fits(self, text: str, expected: Any) -> bool:
        try:
            given = json.loads(text)
        except (ValueError, RecursionError):
            return False
        if self.match == "subset" and isinstance(given, dict) and isinstance(expected, dict):
            return all(key in given and same(given[key], value) for key, value in expected.items())
        return same(given, expected)


def same(one: Any, other: Any, depth: int = 0) -> bool:
    """Equality of JSON values: 1 and 1.0 are the same number, true and 1 are not the same."""
    if depth > 100:
        return False
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, int | float) and isinstance(other, int | float):
        return one == other or (isinstance(one, float) and isinstance(other, float) and math.isclose(one, other, rel_tol=1e-9))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key], depth + 1) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(same(a, b, depth + 1) for a, b in zip(one, other, strict=True))
    return type(one) is type(other) and one == other
