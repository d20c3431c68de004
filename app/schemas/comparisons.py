"""Comparisons: the same data with several strategies or base models, or growing fractions of it with one."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from app.evaluation.comparison_plan import ComparisonOrder, Kind
from app.evaluation.comparison_table import Unit
from app.objectives import SETTINGS
from app.run_settings import RunSettings
from app.schemas.base import UNBUILT, Problem, Schema
from app.schemas.fine_tuning import JobEstimate
from app.strategies import AnyStrategy


class CreateComparison(ComparisonOrder):
    """The data, the strategies and the settings. `run` and `preference` apply to all jobs."""

    model_config = UNBUILT

    strategies: list[str | AnyStrategy] = Field(  # type: ignore[assignment]  # as documents show it
        min_length=1, max_length=40, description="Names, or strategies with their settings as a job takes them."
    )
    run: RunSettings = Field(default_factory=RunSettings)  # type: ignore[assignment]
    preference: SETTINGS | None = None


class RefusedStrategy(Schema):
    """A strategy that this model or machine cannot run."""

    model: str | None = Field(None, description="The base model.")
    strategy: str
    title: str
    reason: str


class PlannedJob(Schema):
    """A job that would be queued, with its estimate."""

    model: str
    strategy: str
    title: str
    estimate: JobEstimate | None


class ComparisonPlan(Schema):
    """The jobs that a comparison would queue and refuse. Nothing was queued."""

    object: Literal["comparison.plan"]
    data: list[PlannedJob]
    refused: list[RefusedStrategy]
    seconds: float = Field(description="Of all jobs, one after the other.")


class ComparisonColumn(Schema):
    """One column of the table: its key in a row, and whether lower is better."""

    key: str
    title: str
    unit: Unit
    less: bool
    predicted: str | None = Field(description="The key of the number that was predicted for it.")


class ComparisonRow(Schema):
    """One job. A metric is null while the job has not computed it; memory is in bytes, losses in nats per trained token."""

    job: str
    name: str
    status: str
    base_model: str
    dataset: str = Field(description="Name of the dataset.")
    parameters: int = Field(description="Of the base model.")
    strategy: str
    blank: bool = Field(description="Whether it began with random weights.")
    title: str
    data_fraction: float
    step: int
    total_steps: int | None
    seconds_left: float | None
    loss: float | None
    bits_per_byte: float | None = Field(description="Of the answers; comparable across tokenizers.")
    accuracy: float | None
    macro_f1: float | None
    reward: float | None
    reward_accuracy: float | None
    rating_accuracy: float | None
    rows: int | None
    forgetting: float | None
    interval: tuple[float, float] | None
    verdict: str | None
    trainable_parameters: int | None
    predicted_trainable_parameters: int | None
    peak_memory_bytes: int | None
    predicted_memory_bytes: int | None
    seconds: float | None
    predicted_seconds: float | None
    model: str | None = Field(description="The fine-tuned model.")
    kept: bool | None = Field(description="Whether pages offer its model; see `kept` of a model.")
    bytes: int | None
    error: Problem | None


class MoreData(Schema):
    """Whether more data would help, and the evidence."""

    answer: Literal["more", "enough", "unclear"]
    sentence: str


class DatasetColumn(Schema):
    """One dataset of a matrix, and the score that its runs are judged by."""

    dataset_id: str
    name: str
    score: str
    title: str
    less: bool


class CellOfMatrix(Schema):
    """One run of a matrix."""

    job: str
    status: str
    score: float | None
    interval: tuple[float, float] | None = Field(description="95%, over its validation rows.")
    best: bool = Field(description="Better than all others on this dataset beyond chance.")


class RowOfMatrix(Schema):
    """One base model with one method."""

    model: str
    parameters: int = Field(description="Of the base model.")
    title: str
    cells: list[CellOfMatrix | None] = Field(description="In the order of the columns.")


class ComparisonMatrix(Schema):
    """Base models and methods by datasets."""

    columns: list[DatasetColumn]
    rows: list[RowOfMatrix]


class Comparison(Schema):
    """Metrics of several jobs next to each other."""

    id: str
    object: Literal["comparison"]
    created_at: int = Field(description="Seconds since 1970.")
    name: str
    kind: Kind
    status: Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"] = Field(
        description="Once all its jobs have ended: succeeded if one of them did."
    )
    model: str | None = Field(description="The base model; null where several are compared.")
    models: list[str] = Field(description="The base models.")
    dataset_ids: list[str] = Field(description="The datasets of its runs.")
    score: str = Field(description="Key of the column the jobs are judged by.")
    columns: list[ComparisonColumn]
    data: list[ComparisonRow]
    base: dict[str, float] = Field(description="The scores of the base model, by column; empty where several are compared.")
    bases: dict[str, dict[str, float]] = Field(description="The same by base model.")
    winners: dict[str, list[str]] = Field(
        description="By column the id of the job that is best beyond chance; none where intervals meet or values tie."
    )
    refused: list[RefusedStrategy]
    says: MoreData | None
    matrix: ComparisonMatrix | None = Field(description="Of the kind `matrix`.")
