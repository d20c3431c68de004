"""Uploaded files, and the forms that upload them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, WithJsonSchema

from app.schemas.base import Schema
from app.storage.files import UPLOAD_PURPOSES

Bytes = Annotated[bytes, WithJsonSchema({"type": "string", "format": "binary"})]


class UploadedFile(Schema):
    """A `file`, as the OpenAI API has it."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int = Field(description="Seconds since 1970.")
    filename: str
    purpose: str
    status: Literal["uploaded", "processed", "error"]
    status_details: str | None
    expires_at: int | None


class CreateFile(Schema):
    """The fields of the multipart form."""

    file: Bytes
    purpose: Annotated[str, Field(json_schema_extra={"enum": sorted(UPLOAD_PURPOSES)})]
    expires_after_anchor: Literal["created_at"] = Field("created_at", alias="expires_after[anchor]")
    expires_after_seconds: int | None = Field(None, alias="expires_after[seconds]", ge=3600, le=2_592_000)
