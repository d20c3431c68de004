"""Batches of API requests, with the names of OpenAI's API."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from app.schemas.base import Schema


class BatchError(Schema):
    """Why the input file cannot be run."""

    code: str
    message: str
    line: int | None = Field(description="Line of the input file, from 1.")
    param: str | None


class BatchErrors(Schema):
    """Errors of the input file, at most 100."""

    object: Literal["list"]
    data: list[BatchError]


class BatchCounts(Schema):
    """Requests by how they ended; those that were not sent are in none of the two."""

    total: int
    completed: int
    failed: int


class BatchInputTokens(Schema):
    """Of the tokens read, those found in a cache."""

    cached_tokens: int


class BatchOutputTokens(Schema):
    """Of the tokens written, those of reasoning."""

    reasoning_tokens: int


class BatchUsage(Schema):
    """Tokens of all answers."""

    input_tokens: int
    input_tokens_details: BatchInputTokens
    output_tokens: int
    output_tokens_details: BatchOutputTokens
    total_tokens: int


class Batch(Schema):
    """Requests of a file that are answered in the background. Times are Unix seconds."""

    id: str
    object: Literal["batch"]
    endpoint: str
    model: str | None = Field(description="The model that all requests name; null where they differ, and before the file was read.")
    errors: BatchErrors | None = Field(description="Why the file could not be run, where the status is failed.")
    input_file_id: str
    completion_window: Literal["24h"]
    status: Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
    output_file_id: str | None = Field(description="File with the answers, once it has ended; null without any.")
    error_file_id: str | None = Field(description="File with the requests that failed or were not sent; null without any.")
    created_at: int
    in_progress_at: int | None
    expires_at: int = Field(description="24 hours after it was created; what is not answered until then is not sent.")
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: BatchCounts
    usage: BatchUsage
    metadata: dict[str, str] | None
