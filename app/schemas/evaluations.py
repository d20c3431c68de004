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
    result: EvaluationScores | EvaluationBlend | EvaluationAdvice | None
    error: Problem | None
    created_at: int = Field(description="Seconds since 1970.")
    finished_at: int | None
