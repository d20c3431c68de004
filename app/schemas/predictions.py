"""Predictions: a model applied to all rows of a file."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from app.schemas.base import Problem, Schema


class Prediction(Schema):
    """A run of a model over a file. Its content is available once it has succeeded."""

    id: str
    object: Literal["prediction"]
    status: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    model: str
    file: str | None
    filename: str
    column: str | None = Field(description="The column that is read; detected where none was named.")
    system: str | None
    max_tokens: int
    progress: float | None = Field(description="0 to 1.")
    stage: str | None
    rows: int | None
    added: list[str] = Field(description="Columns that were added to the file's own.")
    without: int | None = Field(description="Rows without a prediction; their column note has the reason.")
    seconds: float | None
    error: Problem | None
    created_at: int = Field(description="Seconds since 1970.")
    finished_at: int | None
