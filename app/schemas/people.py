"""The people of the studio and invitations, in the shape of OpenAI's administration API."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field

from app.schemas.base import Schema

Role = Literal["admin", "member", "viewer"]


class ChangeLimits(Schema):
    """Own limits of a person or a project that are changed; null takes one away, so that that of the settings is in force."""

    model_config = ConfigDict(extra="forbid")

    running_jobs: int | None = Field(None, ge=0, le=10**9, description="Most jobs that train at once; further ones wait.")
    queued_jobs: int | None = Field(None, ge=0, le=10**9, description="Most jobs that wait in the queue.")
    gpu_hours_per_month: float | None = Field(
        None, ge=0, le=10**9, allow_inf_nan=False, description="In a month of UTC; a train worker without a GPU counts as one."
    )
    storage_bytes: int | None = Field(None, ge=0, le=10**15, description="Files, models and checkpoints.")
    tokens_per_day: int | None = Field(None, ge=0, le=10**15, description="Tokens that models write, embed or classify in a day of UTC.")
    requests_per_minute: int | None = Field(None, ge=0, le=10**9, description="Requests of the API; pages are not counted.")


class ResourceLimits(Schema):
    """Own limits of a person or a project; null: that of the settings."""

    running_jobs: int | None
    queued_jobs: int | None
    gpu_hours_per_month: float | None
    storage_bytes: int | None
    tokens_per_day: int | None
    requests_per_minute: int | None


class ResourceUse(Schema):
    """What is used of everything that is limited."""

    running_jobs: int
    queued_jobs: int
    gpu_hours_per_month: float
    storage_bytes: int
    tokens_per_day: int
    requests_per_minute: int


class ChangePerson(Schema):
    """What is changed of a person; what is omitted stays."""

    model_config = ConfigDict(extra="forbid")

    role: Role | None = Field(None, description="A viewer changes nothing, a member works, an admin lets people in too.")
    hand_over_to: str | None = Field(
        None, max_length=80, description="Id of the person who gets everything of this one, who leaves: the account is disabled for good."
    )
    limits: ChangeLimits | None = Field(None, description="Those that are sent are changed.")
    disabled: bool | None = Field(
        None, description="True ends the person's sessions and revokes the keys; false lets the person sign in again."
    )


class Person(Schema):
    """Somebody with an account."""

    object: Literal["organization.user"]
    id: str
    name: str
    role: Role
    added_at: int
    disabled: bool
    limits: ResourceLimits
    usage: ResourceUse | None = Field(None, description="Of one person that is retrieved.")


class CreateInvite(Schema):
    """Whom an invitation is for."""

    model_config = ConfigDict(extra="forbid")

    role: Role = Field("member", description="The role of the account that is made with it.")
    note: str = Field("", max_length=200, description="Whom it is for.")
    days: float = Field(7, gt=0, le=90, description="How long it holds.")


class Invite(Schema):
    """A link with which one person makes an account."""

    object: Literal["organization.invite"]
    id: str
    role: Role
    note: str
    status: Literal["pending", "accepted", "expired", "revoked"]
    created_at: int
    expires_at: int
    user_id: str | None = Field(description="The account that was made with it.")
    url: str | None = Field(description="The link, in the answer that creates it alone.")
