"""Prompts in versions, and their runs over the rows of a dataset."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from app.prompts.runs import RunOrder
from app.prompts.service import PromptBody
from app.schemas.base import UNBUILT, Problem, Schema


class CreatePrompt(PromptBody):
    """A new prompt: its name, and the body of its first version."""

    model_config = UNBUILT

    name: str


class RevisePrompt(PromptBody):
    """The settings of the next version; omitted fields are taken from the newest."""

    model_config = UNBUILT


class PromptVersion(Schema):
    """One version of a prompt."""

    version: int
    body: PromptBody
    created_at: int


class Prompt(Schema):
    """A prompt with all its versions; `body` is the newest."""

    id: str
    object: Literal["prompt"]
    name: str
    version: int
    body: PromptBody
    versions: list[PromptVersion]
    created_at: int = Field(description="Seconds since 1970.")


class CreatePromptRun(RunOrder):
    """The model, the version, and the rows: of a dataset by its id, or by the file it was parsed from."""

    model_config = UNBUILT

    model: str
    dataset_id: str | None = None
    file: str | None = None
    version: int | None = Field(None, description="The newest if omitted.")


class PromptRunResult(Schema):
    """The mean score with its 95% interval, and the tokens and seconds."""

    score: float | None = None
    low: float | None = None
    high: float | None = None
    rows: int | None = None
    prompt_tokens: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    unanswered: int | None = None
    unanswered_lines: list[int] | None = None
    asked_of: int | None = None


class PromptRun(Schema):
    """A run of a prompt with a model, row by row."""

    id: str
    object: Literal["prompt.run"]
    status: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    model: str
    revision: str
    dataset: str
    dataset_id: str
    part: Literal["validation", "all"]
    validation_fraction: float | None
    split_seed: int | None
    score_rule: str
    progress: float | None
    result: PromptRunResult | None
    error: Problem | None
    created_at: int
    finished_at: int | None


class PromptRunRow(Schema):
    """The result of one row."""

    line: int
    input: str
    rendered_prompt: str
    expected: str
    said: list[str]
    answer: str
    score: float


class PromptRunRows(Schema):
    """One page of results in the dataset's order; `after` is the line of the last row."""

    object: Literal["list"]
    data: list[PromptRunRow]
    has_more: bool
