"""A reward model, whose number for the answer becomes a score."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from app.graders._base import JSON, GradedSample, GradeError, Grader, Result, RewardAsk, Steps
from app.graders._judge import JudgeMessage
from app.graders._templates import fill
from app.languages import gettext, mark


class RewardModelGrader(Grader):
    place: ClassVar = 47
    title: ClassVar = mark("Reward model")
    summary: ClassVar = mark("A reward model that was trained on pairs gives the answer a number; the score is its sigmoid.")
    example: ClassVar = {"model": ""}
    ours: ClassVar = True

    type: Literal["reward_model"]
    model: str = Field(min_length=1, max_length=300, description=mark("The reward model, one of this studio."))
    input: tuple[JudgeMessage, ...] | None = Field(
        None, min_length=1, max_length=50, description=mark("Messages before the answer, with templates. Without them, those of the row.")
    )

    def models(self) -> Iterator[str | None]:
        yield self.model

    def steps(self, sample: GradedSample, item: JSON) -> Steps:
        answer = {"role": "assistant", "content": sample.output_text}
        reply = yield RewardAsk(self.model, (*self._asked(sample, item), answer))
        return Result(sigmoid(reply.reward), {"reward": reply.reward}, {reply.model or self.model: reply.tokens})

    def _asked(self, sample: GradedSample, item: JSON) -> list[JSON]:
        if self.input is not None:
            roles = ("system" if one.role == "developer" else one.role for one in self.input)
            return [{"role": role, "content": fill(one.content, sample, item)} for role, one in zip(roles, self.input, strict=True)]
        messages = item.get("messages")
        if isinstance(messages, list) and all(isinstance(one, dict) and isinstance(one.get("content"), str) for one in messages):
            last = max((place for place, one in enumerate(messages) if one.get("role") == "assistant"), default=len(messages))
            return [{"role": one.get("role", "user"), "content": one["content"]} for one in messages[:last]]
        if not isinstance(item.get("prompt"), str):
            said = gettext("The row has no messages and no prompt that the answer is to; give the grader an input.")
            raise GradeError("invalid_variable_error", said)
        return [{"role": "user", "content": item["prompt"]}]


def sigmoid(reward: float) -> float:
    """1 / (1 + exp(−r)), for any finite number."""
    return 1 / (1 + math.exp(-reward)) if reward >= 0 else math.exp(reward) / (1 + math.exp(reward))
