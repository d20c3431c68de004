"""Uploaded files, and the forms that upload them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

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


class ExpiresAfter(BaseModel):
    model_config = ConfigDict(extra="forbid")

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=3600, le=2_592_000)]


class CreateUpload(BaseModel):
    """An upload in parts. `mime_type` is taken and not needed: the name of the file says how it is read."""

    model_config = ConfigDict(extra="forbid")

    bytes: int = Field(ge=1)
    filename: str = Field(min_length=1, max_length=512)
    purpose: Annotated[str, Field(json_schema_extra={"enum": sorted(UPLOAD_PURPOSES)})]
    mime_type: str = Field("", max_length=256)
    expires_after: ExpiresAfter | None = None


class CreateUploadPart(Schema):
    """The field of the multipart form."""

    data: Bytes


class CompleteUpload(BaseModel):
    model_config = ConfigDict(extra="forbid")

    part_ids: list[str] = Field(min_length=1, max_length=10_000, description="Ids of the parts, in the order of the file.")
    md5: str | None = Field(None, pattern="^[0-9a-fA-F]{32}$", description="MD5 of the whole file, in hexadecimal.")


class UploadPart(Schema):
    """An `upload.part`, as the OpenAI API has it."""

    id: str
    object: Literal["upload.part"]
    created_at: int
    upload_id: str


class PartedUpload(Schema):
    """An `upload`, as the OpenAI API has it."""

    id: str
    object: Literal["upload"]
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: Literal["pending", "completed", "cancelled"]
    file: UploadedFile | None
