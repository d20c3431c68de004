"""Projects and their members, in the shape of OpenAI's administration API."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field

from app.schemas.base import Schema
from app.schemas.people import ChangeLimits, ResourceLimits, ResourceUse, Role


class NameProject(Schema):
    """What a project is called."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=80)


class ChangeProject(Schema):
    """What is changed of a project; what is omitted stays."""

    model_config = ConfigDict(extra="forbid")

    name: str | None = Field(None, min_length=1, max_length=80)
    weight: float | None = Field(
        None, ge=0.01, le=100, allow_inf_nan=False, description="What its work uses of the machine counts divided by this; 1 is usual."
    )
    limits: ChangeLimits | None = Field(None, description="Those that are sent are changed.")


class Project(Schema):
    """A room of things that its members see. Everything belongs to one."""

    object: Literal["organization.project"]
    id: str
    name: str
    personal: bool = Field(description="Somebody's own: it has no further members.")
    weight: float = Field(description="What its work uses of the machine counts divided by this.")
    limits: ResourceLimits
    usage: ResourceUse | None = Field(None, description="Of one project that is retrieved.")
    created_at: int


class ProjectContents(Schema):
    """What is in a project, and would be moved or deleted with it."""

    object: Literal["organization.project.contents"]
    counts: dict[str, int] = Field(description="By kind, of what was not deleted before.")
    bytes: int = Field(description="Of files, models and checkpoints.")


class AddMember(Schema):
    """Who becomes a member of a project, and as what."""

    model_config = ConfigDict(extra="forbid")

    user_id: str = Field(max_length=80)
    role: Role = "member"


class ChangeMember(Schema):
    """Another role in a project."""

    model_config = ConfigDict(extra="forbid")

    role: Role


class ProjectMember(Schema):
    """A person in a project, with the role there."""

    object: Literal["organization.project.user"]
    id: str
    name: str
    role: Role
    added_at: int
