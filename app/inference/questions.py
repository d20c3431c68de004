"""Questions to models from a process without a network, as lines of JSON: what a grader asks, which answers a server shall draw, and what came back."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from app.graders import Ask, EmbedAsk, JudgeAsk, Reply, RewardAsk

MAX_LINE_BYTES = 4 << 20
"""Of a question; a longer one is not read."""
SERVED = "served"
"""The folder in an attempt's with the adapters that a server loads, one folder each."""


class DrawAsk(BaseModel):
    """Answers to one prompt from the server that answers for the base model, drawn at temperature 1 from the whole distribution."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    adapter: str = Field("", pattern=r"^(\d{1,12})?$")  # a folder of the trainer's own; empty is the base
    prompt: tuple[int, ...]
    count: int = Field(ge=1, le=64)
    most: int = Field(ge=1)  # tokens of an answer
    stops: tuple[int, ...]
    seed: int


class DrawnTokens(BaseModel):
    """One answer: its tokens, the one that ended it included; minus the log-probability of each in nats; whether a stop token ended it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ids: tuple[int, ...]
    nats: tuple[float, ...]
    ended: bool


class Question(BaseModel):
    """One question, which is exactly one of `judge`, `embed`, `reward` and `draw`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: int
    judge: JudgeAsk | None = None
    embed: EmbedAsk | None = None
    reward: RewardAsk | None = None
    draw: DrawAsk | None = None

    @classmethod
    def of(cls, number: int, ask: Ask) -> Question:
        kind = "judge" if isinstance(ask, JudgeAsk) else "embed" if isinstance(ask, EmbedAsk) else "reward"
        return cls(id=number, **{kind: ask})

    @property
    def ask(self) -> Ask | None:
        return self.judge or self.embed or self.reward


class QuestionAnswer(BaseModel):
    """The reply, or the answers that were drawn, or why there is none; `away` where the model could not be asked at all."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: int
    reply: Reply | None = None
    drawn: tuple[DrawnTokens, ...] | None = None
    error: str = ""
    away: bool = False
