"""Evals, their runs and output items, with the names of OpenAI's API."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.evals.sources import DataSource
from app.jobs.request import MetadataKey, MetadataValue
from app.schemas.base import Schema


class CreateEval(BaseModel):
    """What items look like, and what an answer is graded by."""

    model_config = ConfigDict(extra="forbid", defer_build=True)

    name: str | None = Field(None, max_length=200)
    data_source_config: dict[str, Any] = Field(
        description='`{"type": "custom", "item_schema": {…}, "include_sample_schema": true}`, or `{"type": "logs", "metadata": {…}}` for stored completions.'
    )
    testing_criteria: list[dict[str, Any]] = Field(description="Graders, each with a pass_threshold where it has one.")
    metadata: dict[MetadataKey, MetadataValue] | None = Field(None, max_length=16)


class ChangeEval(BaseModel):
    """What changes; fields that are omitted stay."""

    model_config = ConfigDict(extra="forbid", defer_build=True)

    name: str | None = Field(None, min_length=1, max_length=200)
    metadata: dict[MetadataKey, MetadataValue] | None = Field(None, max_length=16)


class CreateEvalRun(BaseModel):
    """Which items, and which model is asked."""

    model_config = ConfigDict(extra="forbid", defer_build=True)

    name: str | None = Field(None, max_length=200)
    data_source: DataSource
    metadata: dict[MetadataKey, MetadataValue] | None = Field(None, max_length=16)


class EvalDataSourceConfig(Schema):
    """The schema of what a criterion reads: the item, and with include_sample_schema the answer."""

    type: Literal["custom", "logs", "stored_completions"]
    schema_: dict[str, Any] = Field(alias="schema")
    metadata: dict[str, str] | None = Field(None, description="Pairs that each stored completion must carry.")


class Eval(Schema):
    """Criteria for the answers of a model."""

    id: str
    object: Literal["eval"]
    name: str
    data_source_config: EvalDataSourceConfig
    testing_criteria: list[dict[str, Any]]
    metadata: dict[str, str] | None
    created_at: int


class DeletedEval(Schema):
    """The eval that was deleted."""

    object: Literal["eval.deleted"]
    deleted: Literal[True]
    eval_id: str


class DeletedEvalRun(Schema):
    """The run that was deleted."""

    object: Literal["eval.run.deleted"]
    deleted: Literal[True]
    run_id: str


class EvalError(Schema):
    """What went wrong."""

    code: str
    message: str


class EvalModelUsage(Schema):
    """What one model was asked in a run: the one that is tried, and those that graders ask."""

    model_name: str
    invocation_count: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    total_tokens: int


class EvalCriterionResult(Schema):
    """How many items passed one criterion."""

    testing_criteria: str
    passed: int
    failed: int


class EvalResultCounts(Schema):
    """Items by how they ended; one that could not be answered or graded is errored."""

    total: int
    passed: int
    failed: int
    errored: int


class EvalRun(Schema):
    """One run of an eval over items."""

    id: str
    object: Literal["eval.run"]
    eval_id: str
    name: str
    status: Literal["queued", "in_progress", "completed", "failed", "canceled"]
    model: str = Field(description="The model that is asked; empty where the items bring their answers.")
    data_source: dict[str, Any]
    error: EvalError | None
    per_model_usage: list[EvalModelUsage]
    per_testing_criteria_results: list[EvalCriterionResult]
    result_counts: EvalResultCounts
    report_url: str
    metadata: dict[str, str] | None
    created_at: int


class EvalItemResult(Schema):
    """The grade of one criterion."""

    name: str
    type: str
    passed: bool
    score: float = Field(description="In the grader's own range.")
    sample: dict[str, Any] | None
    error: str | None = Field(None, description="Why it could not be graded.")


class EvalMessage(Schema):
    """A message that was sent."""

    role: str
    content: str


class EvalAnswer(Schema):
    """A message that was answered."""

    role: str
    content: str | None
    tool_calls: list[dict[str, Any]] | None = None


class EvalSampleUsage(Schema):
    """Tokens of one answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int


class EvalSample(Schema):
    """What a model was sent for an item, and what it answered."""

    input: list[EvalMessage]
    output: list[EvalAnswer]
    finish_reason: str
    model: str
    usage: EvalSampleUsage
    error: EvalError | None
    max_completion_tokens: int
    temperature: float
    top_p: float
    seed: int


class EvalOutputItem(Schema):
    """One item of a run."""

    id: str
    object: Literal["eval.run.output_item"]
    eval_id: str
    run_id: str
    status: Literal["pass", "fail", "error"]
    datasource_item_id: int
    datasource_item: dict[str, Any]
    results: list[EvalItemResult]
    sample: EvalSample
    created_at: int
