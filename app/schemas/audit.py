"""The audit log, as OpenAI's admin API has it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from app.schemas.base import Schema


class AuditPerson(Schema):
    """Who did it. An account has no e-mail address here, so `email` is its name."""

    id: str | None
    email: str | None


class AuditSession(Schema):
    """The browser session, or the console, in which it was done."""

    user: AuditPerson | None
    ip_address: str | None


class AuditKey(Schema):
    """The API key with which it was done."""

    id: str | None
    type: Literal["user"]
    user: AuditPerson


class AuditActor(Schema):
    """Who did it, by a session or an API key; `session` without a user is one who was not let in."""

    type: Literal["session", "api_key"]
    session: AuditSession | None
    api_key: AuditKey | None


class AuditedObject(Schema):
    """The object of an event."""

    id: str | None


class AuditedFailure(Schema):
    """Why a sign-in was refused."""

    error_code: str
    error_message: str


class AuditLog(Schema):
    """One event of the audit log."""

    id: str
    object: Literal["organization.audit_log"]
    type: str = Field(description="What was done, as `api_key.created`, `job.cancelled`, `login.failed` or `file.downloaded`.")
    effective_at: int = Field(description="Unix seconds.")
    actor: AuditActor
    object_id: str | None = Field(description="Id of the object, or what the path of the request named.")
    ip_address: str | None
    request_id: str | None = Field(description="The `X-Request-Id` of the answer.")
    details: dict[str, Any] | None = Field(description="Method and route of the request.")
    api_key_created: AuditedObject | None = Field(None, alias="api_key.created")
    api_key_deleted: AuditedObject | None = Field(None, alias="api_key.deleted")
    permission_created: AuditedObject | None = Field(None, alias="checkpoint.permission.created")
    permission_deleted: AuditedObject | None = Field(None, alias="checkpoint.permission.deleted")
    login_failed: AuditedFailure | None = Field(None, alias="login.failed")
