"""Questions to models from a process without a network, as lines of JSON: what a grader asks, and what came back."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from app.graders import Ask, EmbedAsk, JudgeAsk, Reply, RewardAsk

MAX_LINE_BYTES = 4 << 20
"""Of a question; a longer one is not read."""


class Question(BaseModel):
    """One question, which is exactly one of `judge`, `embed` and `reward`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: int
    judge: JudgeAsk | None = None
    embed: EmbedAsk | None = None
    reward: RewardAsk | None = None

    @classmethod
    def of(cls, number: int, ask: Ask) -> Question:
        kind = "judge" if isinstance(ask, JudgeAsk) else "embed" if isinstance(ask, EmbedAsk) else "reward"
        return cls(id=number, **{kind: ask})

    @property
    def ask(self) -> Ask | None:
        return self.judge or self.embed or self.reward


class QuestionAnswer(BaseModel):
    """The reply, or why there is none; `away` where the model could not be asked at all."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: int
    reply: Reply | None = None
    error: str = ""
    away: bool = False
