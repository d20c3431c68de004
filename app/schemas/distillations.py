"""Distillations: a teacher's answers, and what was kept of them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from app.distillations.service import DistillationOrder, Status
from app.schemas.base import UNBUILT, Problem, Schema


class CreateDistillation(DistillationOrder):
    """The teacher, the dataset whose prompts it answers, and what is kept."""

    model_config = UNBUILT

    model: str = Field(description="The teacher: a model of this studio or of a registered server.")
    dataset_id: str = Field(description="Dataset of the prompts.")


class DistillationResult(Schema):
    """How many prompts were answered and kept, and the scores. Also tokens and seconds."""

    prompts: int | None = None
    kept: int | None = None
    share: float | None = Field(None, description="Share of the prompts of which an answer was kept.")
    interval: tuple[float, float] | None = Field(None, description="95% interval of that share.")
    mean_score: float | None = Field(None, description="Over all answers.")
    mean_best: float | None = Field(None, description="Over the best answer to each prompt.")
    best_score: float | None = None
    asked_of: int | None = Field(None, description="Prompts that are to be answered.")
    prompt_tokens: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    unanswered: int | None = None
    unanswered_lines: list[int] | None = None


class Distillation(Schema):
    """A run: a teacher answers the prompts of a dataset, and the best answers become another."""

    object: Literal["distillation"]
    id: str
    status: Status
    teacher: str
    revision: str
    dataset_id: str
    license: str = Field(description="License of the teacher.")
    rows: int
    answers: int
    grader: dict[str, Any] | None
    threshold: float
    temperature: float
    max_tokens: int
    system: str
    seed: int
    name: str = Field(description="Name of the dataset that it makes.")
    result_dataset_id: str | None = Field(description="The dataset of the answers that were kept.")
    progress: float | None
    result: DistillationResult | None
    error: Problem | None
    created_at: int
    finished_at: int | None


class DistilledAnswer(Schema):
    """One answer; `why` says why it has no score."""

    text: str
    score: float | None
    why: str


class DistilledRow(Schema):
    """The answers to one prompt; `best` is the place of the one that is kept."""

    line: int
    messages: list[dict[str, Any]]
    answers: list[DistilledAnswer]
    best: int | None


class DistilledRows(Schema):
    """One page of answered prompts; `after` is the line of the last one."""

    object: Literal["list"]
    data: list[DistilledRow]
    has_more: bool
