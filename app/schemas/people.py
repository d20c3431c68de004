"""The people of the studio and invitations, in the shape of OpenAI's administration API."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field

from app.schemas.base import Schema

Role = Literal["admin", "member", "viewer"]


class ChangePerson(Schema):
    """What is changed of a person; what is omitted stays."""

    model_config = ConfigDict(extra="forbid")

    role: Role | None = Field(None, description="A viewer changes nothing, a member works, an admin lets people in too.")
    hand_over_to: str | None = Field(
        None, max_length=80, description="Id of the person who gets everything of this one, who leaves: the account is disabled for good."
    )
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
