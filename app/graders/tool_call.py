"""Whether the answer calls the right tool with the right arguments."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import Field, model_validator

from app.graders._base import JSON, GradedSample, GradeError, Grader, Result, Steps
from app.graders._templates import Template, fill
from app.graders._tool_calls import calls_in
from app.languages import gettext, mark


class ToolCallGrader(Grader):
    place: ClassVar = 60
    title: ClassVar = mark("Tool call")
    summary: ClassVar = mark("The answer calls the right tool with the right arguments, or no tool where none is needed.")
    example: ClassVar = {}
    ours: ClassVar = True

    type: Literal["tool_call"]
    tool: Template | None = Field(
        None,
        description=mark("The name of the right tool; none where no call must be made. Without it the calls of the reference are right."),
    )
    arguments: Template | None = Field(None, description=mark("The right arguments, a JSON object; without them the tool alone is graded."))
    match: Literal["exact", "subset"] = Field("exact", description=mark("exact: no other arguments; subset: others are allowed."))

    @model_validator(mode="after")
    def _of_a_tool(self) -> ToolCallGrader:
        if self.tool is None and self.arguments is not None:
            raise ValueError("arguments are those of a tool, and there is no tool.")
        return self

    def steps(self, sample: GradedSample, item: JSON) -> Steps:
        yield from ()
        wanted, calls = self._wanted(sample, item), [call["function"] for call in sample.output_tools]
        tried = {"valid_json": float(bool(calls))} if calls or "<tool_call>" in sample.output_text else {}
        if not wanted:
            return Result(float(not calls), tried | {"needless_call": float(bool(calls))})
        named = sorted(call["name"] for call in calls) == sorted(one.name for one in wanted)
        right = named and self._matched(wanted, calls)
        return Result(float(right), tried | {"right_tool": float(named), "right_arguments": float(right)})

    def _wanted(self, sample: GradedSample, item: JSON) -> list[_Wanted]:
        if self.tool is None:
            if not isinstance(item.get("reference"), str):
                said = gettext("The row has no reference whose calls would be the right ones; name the tool.")
                raise GradeError("invalid_variable_error", said)
            calls = [call["function"] for call in calls_in(item["reference"])]
            fault = gettext("The arguments of the reference are not JSON.")
            return [_Wanted(call["name"], _parsed(call["arguments"], fault)) for call in calls]
        name = fill(self.tool, sample, item).strip()
        if name in ("", "none"):
            return []
        fault = gettext("The right arguments are not JSON.")
        arguments = ... if self.arguments is None else _parsed(fill(self.arguments, sample, item), fault)
        return [_Wanted(name, arguments)]

    def _matched(self, wanted: Sequence[_Wanted], calls: Sequence[JSON]) -> bool:
        """Whether each wanted call is made once, in any order."""
        left = list(calls)
        for one in wanted:
            found = next((call for call in left if call["name"] == one.name and self._fits(call["arguments"], one.arguments)), None)
            if found is None:
                return False
            left.remove(found)
        return not left

    def _fits(self, text: str, expected: Any) -> bool:
        if expected is ...:
            return True
        try:
            given = json.loads(text)
        except (ValueError, RecursionError):
            return False
        if self.match == "subset" and isinstance(given, dict) and isinstance(expected, dict):
            return all(key in given and same(given[key], value) for key, value in expected.items())
        return same(given, expected)


class _Wanted(NamedTuple):
    """A call that is right; any arguments are where `arguments` is an ellipsis."""

    name: str
    arguments: Any


def _parsed(text: str, fault: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise GradeError("invalid_variable_error", fault) from None


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
