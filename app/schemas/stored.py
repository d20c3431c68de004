"""Answers that the API was asked to keep (`store`)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.inference.stored import StoredFilter
from app.jobs.request import MetadataKey, MetadataValue
from app.schemas.answers import ChatToolCall
from app.schemas.base import Schema
from app.schemas.datasets import VoteDataset


class ChangeStored(BaseModel):
    """The metadata of a stored answer, in place of what it had; without the field it stays."""

    model_config = ConfigDict(extra="forbid", defer_build=True)

    metadata: dict[MetadataKey, MetadataValue] | None = Field(None, max_length=16)


class StoredMessage(Schema):
    """A message of a stored chat completion."""

    id: str
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str
    content_parts: list[dict[str, Any]] | None = Field(description="The parts, where the content was sent in parts.")
    name: str | None
    refusal: None
    tool_calls: list[ChatToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class CreateStoredDataset(StoredFilter):
    """Which stored chat completions become rows; all where nothing is named, and 50,000 at most."""

    name: str | None = Field(None, min_length=1, max_length=200)


class StoredRows(VoteDataset):
    """A dataset created from stored chat completions."""

    rows: int
    excluded: int = Field(description="Answers that are empty or were cut off by their length.")
