"""Evaluations: a model scored on a dataset without training."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from app.evaluation.forgetting import Forgetting
from app.evaluation.service import Part
from app.objectives import Task
from app.schemas.base import Problem, Schema
from app.schemas.fine_tuning import ListedRow


class _Measured(Schema):
    rows: int | None = None
    device: str | None = None
    precision: str | None = None
    seconds: float | None = None


class GraderProblem(Schema):
    """Why answers could not be graded, and how many."""

    message: str
    count: int


class GraderPart(Schema):
    """The mean of one number that a grade is made of, as `right_tool`, over the rows whose grade has it."""

    score: float | None
    rows: int
    base: float | None
    base_rows: int


class GraderScore(Schema):
    """The mean score of one grader over the rows that both models were graded on. `difference` is the 95% interval of fine-tuned less
    base; null for fewer than 5 rows."""

    name: str
    type: str
    rows: int
    failed: int = Field(description="Rows without a score of every model; they do not count.")
    score: float | None
    interval: tuple[float, float] | None
    base: float | None
    base_interval: tuple[float, float] | None
    difference: tuple[float, float] | None
    errors: list[GraderProblem]
    parts: dict[str, GraderPart] | None = None
    seconds: float = Field(description="Of all grades together.")
    tokens: int = Field(description="Of judges and encoders.")


class RowScore(Schema):
    """One grader's scores of one row, and why one is missing."""

    base: float | None
    tuned: float | None
    error: str | None


class GradedRow(Schema):
    """The answers to one row, and each grader's scores of them, by the grader's name."""

    line: int
    prompt: str
    reference: str
    base_answer: str | None
    tuned_answer: str
    scores: dict[str, RowScore]


class RowScores(Schema):
    """The score of each row as `[line, value]`."""

    metric: Literal["bits_per_byte", "accuracy"]
    rows: list[tuple[int, float]]


class EvaluationScores(_Measured):
    """Result of the kind scores: scores of the model and of its base by name, and the rows that differ most."""

    scores: dict[str, Any]
    base: dict[str, Any] | None = None
    skipped: int | None = None
    answers: int | None = None
    unanswered: int | None = None
    difference: Any = None
    worst: list[ListedRow] | None = None
    best: list[ListedRow] | None = None
    forgetting: Forgetting | None = None
    graders: list[GraderScore] | None = None
    graded: list[GradedRow] | None = None
    row_scores: RowScores | None = Field(None, description="Null for more than 5,000 rows.")


class BlendPoint(Schema):
    """The model with a fraction of its fine-tuning (weights interpolated with the base's)."""

    blend: float
    score: float
    scores: dict[str, Any]
    forgetting: float | None = None
    interval: tuple[float, float] | None = None
    verdict: str | None = None


class EvaluationBlend(_Measured):
    """Result of the kind blend: a curve from the base to the fine-tuned model."""

    points: list[BlendPoint]
    skipped: int | None = None
    metric: str | None = None
    best: Any = None
    advice: Any = None


class EvaluationAdvice(_Measured):
    """Result of the kind advice: the distance of the data from general text, and the score of a prompt alone."""

    distance: float | None = None
    data_bits_per_byte: float | None = None
    general_bits_per_byte: float | None = None
    compared: Literal["texts", "answers"] | None = None
    first_bytes: int | None = None
    zero_shot: Any = None
    few_shot: Any = None
    prompted_rows: int | None = None
    shots: int | None = None
    chance: float | None = None
    how: str | None = None
    reason: str | None = None


class Evaluation(Schema):
    """An evaluation. `result` is set once it has succeeded; its schema depends on `kind`."""

    id: str
    object: Literal["evaluation"]
    kind: Literal["scores", "advice", "blend"]
    status: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    model: str
    base: str | None
    dataset_id: str
    dataset: str
    task: Task
    part: Part
    rows: int
    seed: int
    note: str
    progress: float | None = Field(description="0 to 1.")
    stage: str | None
    position: int | None = Field(
        description="Place in the queue, from 1, while it is queued: of evaluations, or of all work where what trains leaves it no memory."
    )
    expected_start: int | None = Field(description="By the estimates of what runs and what is before it; null where no worker is online.")
    waits_for: str | None = Field(
        description="What keeps it waiting, where something does: a limit of running jobs, or memory that what trains now takes."
    )
    result: EvaluationScores | EvaluationBlend | EvaluationAdvice | None
    error: Problem | None
    created_at: int = Field(description="Seconds since 1970.")
    finished_at: int | None
