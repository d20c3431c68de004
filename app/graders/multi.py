"""Several graders, combined by a formula."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, SerializeAsAny, WithJsonSchema, field_validator, model_validator

from app.graders._base import JSON, GradedSample, GradeError, Grader, Result, Steps
from app.graders._formula import FUNCTIONS, FormulaError, compute, parse
from app.languages import gettext, mark

if TYPE_CHECKING:
    import ast

MAX_GRADERS = 16
_DOCUMENTED = {"anyOf": [{"type": "object"}, {"type": "array", "items": {"type": "object"}}]}


class MultiGrader(Grader):
    place: ClassVar = 200
    title: ClassVar = mark("Combination")
    summary: ClassVar = mark("Several graders, combined by a formula.")
    example: ClassVar = {
        "graders": {
            "same": {"type": "string_check", "name": "same", "input": "{{sample.output_text}}", "operation": "eq", "reference": "{{item.reference}}"},
            "close": {"type": "text_similarity", "name": "close", "input": "{{sample.output_text}}", "reference": "{{item.reference}}", "evaluation_metric": "rouge_l"},
        },
        "calculate_output": "0.5 * same + 0.5 * close",
    }  # fmt: skip

    type: Literal["multi"]
    graders: Annotated[dict[str, SerializeAsAny[Grader]], WithJsonSchema(_DOCUMENTED)] = Field(
        description=mark("Graders by the names that the formula has for them; or one grader.")
    )
    calculate_output: str = Field(
        min_length=1,
        max_length=2000,
        description=mark("A formula of the graders' names, numbers, + - * / ^ and min, max, abs, floor, ceil, exp, sqrt, log."),
    )

    @field_validator("graders", mode="before")
    @classmethod
    def _read(cls, given: Any) -> Any:
        """Also one grader, as the newest client's types have it, or a list of graders: each has its own name in the formula."""
        from app.graders import read_child

        if isinstance(given, dict) and isinstance(given.get("type"), str):
            given = [given]
        if isinstance(given, list):
            named = {str(one.get("name")): one for one in given if isinstance(one, dict)}
            if len(named) != len(given):
                raise ValueError("each grader needs a name of its own")
            given = named
        if not isinstance(given, dict) or not 1 <= len(given) <= MAX_GRADERS:
            raise ValueError(f"name 1 to {MAX_GRADERS} graders")
        for name in given:
            if not str(name).isidentifier() or name in FUNCTIONS:
                raise ValueError(f"{str(name)[:60]!r} cannot be a name in a formula")
        return {name: read_child(one) for name, one in given.items()}

    @model_validator(mode="after")
    def _parsed(self) -> Self:
        try:
            parse(self.calculate_output, self.graders)
        except FormulaError as error:
            raise ValueError(f"the formula does not work: {error}") from None
        return self

    @functools.cached_property
    def formula(self) -> ast.expr:
        return parse(self.calculate_output, self.graders)

    def prove(self) -> None:
        for grader in self.graders.values():
            grader.prove()

    def models(self) -> Iterator[str | None]:
        for grader in self.graders.values():
            yield from grader.models()

    def children(self) -> Mapping[str, Grader]:
        return self.graders

    def steps(self, sample: GradedSample, item: JSON) -> Steps:
        found: dict[str, Result] = {}
        for name, grader in self.graders.items():
            found[name] = yield from grader.steps(sample, item)
        try:
            reward = compute(self.formula, {name: one.reward for name, one in found.items()})
        except FormulaError as error:
            raise GradeError("formula_parse_error", gettext("The formula has no value: %(reason)s.", reason=error)) from None
        tokens: dict[str, int] = {}
        for one in found.values():
            for model, count in one.tokens.items():
                tokens[model] = tokens.get(model, 0) + count
        return Result(reward, {name: one.reward for name, one in found.items()}, tokens)
