"""A judge that gives a number."""

from __future__ import annotations

import math
from typing import ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from app.graders._base import JSON, GradedSample, GradeError, JudgeAsk, Result, Steps
from app.graders._judge import Judge, result_in
from app.kit.answers import number_in
from app.languages import gettext, mark


class SamplingParams(BaseModel):
    """How the judge answers. Without a temperature it takes the likeliest tokens, so that it gives the same score again."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    max_completions_tokens: int | None = Field(None, ge=1, le=4096)
    reasoning_effort: None = Field(None, description="Not supported: judges here have no such setting.")


class ScoreModelGrader(Judge):
    place: ClassVar = 40
    title: ClassVar = mark("Judge, score")
    summary: ClassVar = mark("A model reads the answer and gives it a number.")
    example: ClassVar = {
        "model": "",
        "input": [
            {"role": "user", "content": "How well does this answer match the reference?\n\nReference: {{item.reference}}\nAnswer: {{sample.output_text}}"}
        ],
        "range": [0, 1],
    }  # fmt: skip

    type: Literal["score_model"]
    range: tuple[float, float] = Field((0.0, 1.0), description=mark("The lowest and the highest number."))
    sampling_params: SamplingParams = Field(SamplingParams(), description=mark("How the judge answers."))

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        low, high = self.range
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError("the range needs a lower number and a higher one")
        return self

    def bounds(self) -> tuple[float, float]:
        return self.range

    def ask(self, messages: tuple[JSON, ...]) -> JudgeAsk:
        given = self.sampling_params
        return JudgeAsk(
            self.model,
            messages,
            temperature=given.temperature or 0.0,
            top_p=given.top_p or 1.0,
            max_tokens=given.max_completions_tokens or 256,
            seed=given.seed or 0,
        )

    def steps(self, sample: GradedSample, item: JSON) -> Steps:
        low, high = self.range
        instruction = f'Answer with a JSON object {{"result": NUMBER}}, NUMBER from {low:g} to {high:g}, and nothing else.'
        reply = yield self.ask(self.messages(sample, item, instruction))
        found = result_in(reply.text)
        number = float(found) if isinstance(found, int | float) and not isinstance(found, bool) else number_in(str(found or reply.text))
        if number is None:
            said = gettext("The judge gave no number: %(text)s", text=repr(reply.text[:200]))
            raise GradeError("model_grader_parse_error", said)
        if not low <= number <= high:
            said = gettext(
                "The judge gave %(number)s, which is not between %(low)s and %(high)s.",
                number=format(number, "g"),
                low=format(low, "g"),
                high=format(high, "g"),
            )
            raise GradeError("model_grader_parse_error", said)
        return Result(number, tokens={reply.model or self.model: reply.tokens})
