"""Graders: what scores an answer."""

from __future__ import annotations

import functools
import operator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel

from app.graders import GRADERS
from app.schemas.base import UNBUILT, Schema

ANY: Any = Annotated[functools.reduce(operator.or_, GRADERS.values()), Field(discriminator="type")]
"""Every type of grader, as documents show it."""
MAX_ITEM_BYTES = 1 << 20


class AnyGrader(RootModel[ANY]):
    """A grader: its type, its name, and the fields of its type."""

    model_config = UNBUILT


class RunGrader(BaseModel):
    """A grader, an answer, and the row that the answer is to."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=()) | UNBUILT

    grader: AnyGrader
    model_sample: str = Field(description="The answer; `sample` in templates.")
    item: dict[str, Any] | None = Field(None, description="The row; `item` in templates.")


class ValidateGrader(BaseModel):
    """A grader to be checked."""

    model_config = ConfigDict(extra="forbid") | UNBUILT

    grader: AnyGrader


class GraderErrors(Schema):
    """Why an answer could not be graded. None of them is set where it could."""

    formula_parse_error: bool
    invalid_variable_error: bool
    model_grader_parse_error: bool
    model_grader_refusal_error: bool
    model_grader_server_error: bool
    model_grader_server_error_details: str | None
    other_error: bool
    python_grader_runtime_error: bool
    python_grader_runtime_error_details: str | None
    python_grader_server_error: bool
    python_grader_server_error_type: str | None
    sample_parse_error: bool
    truncated_observation_error: bool
    unresponsive_reward_error: bool
    message: str | None = Field(description="What went wrong, in words.")


class GraderRunMetadata(Schema):
    """How a grader came to its reward."""

    name: str
    type: str
    errors: GraderErrors
    execution_time: float = Field(description="Seconds.")
    scores: dict[str, float]
    token_usage: int | None
    sampled_model_name: str | None


class GraderRun(Schema):
    """The reward of one answer, in the grader's own range, and those of its parts."""

    reward: float
    sub_rewards: dict[str, float]
    metadata: GraderRunMetadata
    model_grader_token_usage_per_model: dict[str, int]


class ValidGrader(Schema):
    """A grader that works here."""

    grader: dict[str, Any]


class TwoAnswers(BaseModel):
    """Two answers to one row."""

    model_config = ConfigDict(extra="forbid") | UNBUILT

    item: dict[str, Any] | None = Field(None, description="The row; `item` in templates.")
    first: str
    second: str


class CompareAnswers(BaseModel):
    """A judge, and the answers that it compares. In its messages `sample.output_text` is both answers."""

    model_config = ConfigDict(extra="forbid") | UNBUILT

    grader: AnyGrader = Field(description="A judge: score_model or label_model.")
    rows: list[TwoAnswers] = Field(min_length=1, max_length=50)


class ComparedAnswers(Schema):
    """Which answer the judge finds better with the first in front (`straight`) and with the second in front (`swapped`)."""

    straight: Literal["first", "second", "tie"] | None
    swapped: Literal["first", "second", "tie"] | None
    winner: Literal["first", "second", "tie"] | None = Field(description="The verdict of both orders; null where they differ.")
    position: Literal[1, 2] | None = Field(description="The place that it chose in both orders, whose answers had changed places.")
    error: str | None


class JudgeAgreement(Schema):
    """How often the judge agrees with itself when the sides are swapped."""

    rows: int = Field(description="Rows with a verdict in both orders.")
    agreed: int
    share: float
    interval: tuple[float, float] = Field(description="Wilson's 95% interval of the share.")
    by_position: int = Field(description="Rows on which it chose the same place twice.")
    first_place: int = Field(description="Those of them on which that was the first.")
    wins: dict[str, int] = Field(description="Rows by their winner in both orders: first, second, tie.")
    failed: int


class GraderComparison(Schema):
    """Pairs of answers before a judge."""

    object: Literal["grader.comparison"]
    rows: list[ComparedAnswers]
    agreement: JudgeAgreement | None = Field(description="Null where no row has both verdicts.")


class ChangeGrader(BaseModel):
    """The grader as it shall be from now on."""

    model_config = ConfigDict(extra="forbid") | UNBUILT

    grader: AnyGrader


class CreateGrader(ChangeGrader):
    """The grader to be saved, under its own name."""


class SavedGrader(Schema):
    """A saved grader."""

    id: str
    object: Literal["grader"]
    name: str
    grader: dict[str, Any]
    created_at: int = Field(description="Seconds since 1970.")
    updated_at: int
