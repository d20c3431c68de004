"""Projects: everything that people make belongs to one, and its members see it."""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Any

from sqlalchemy import CheckConstraint, Connection, ForeignKey, event, false
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Mapped, Session, mapped_column

from app.tables._base import JSON, Base, new_key, now
from app.tables.users import User


class Project(Base):
    """A room of things. Each person has one of their own, with the person's id."""

    __tablename__ = "projects"
    id: Mapped[uuid.UUID] = new_key()
    name: Mapped[str]
    personal: Mapped[bool] = mapped_column(server_default=false(), comment="somebody's own; it has no further members")
    weight: Mapped[float] = mapped_column(server_default="1", comment="how much of the machine its work may use beside others")
    limits: Mapped[JSON | None] = mapped_column(comment="app.limits.LIMITS, where an admin set one")
    created_at: Mapped[datetime] = now()
    __table_args__ = (CheckConstraint("weight > 0", name="weight"),)


class ProjectMember(Base):
    __tablename__ = "project_members"
    project_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("projects.id", ondelete="CASCADE"), primary_key=True)
    user_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), primary_key=True, index=True)
    role: Mapped[str] = mapped_column(comment="admin, member or viewer of this project; the person's role in the studio bounds it")
    created_at: Mapped[datetime] = now()
    __table_args__ = (CheckConstraint("role IN ('admin', 'member', 'viewer')", name="role"),)


class ShareLink(Base):
    """A link that shows a project to whoever has it, until it is taken back. Only the SHA-256 of its token is stored."""

    __tablename__ = "share_links"
    id: Mapped[uuid.UUID] = new_key()
    project_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("projects.id", ondelete="CASCADE"), index=True)
    token_sha256: Mapped[str] = mapped_column(unique=True)
    created_by: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"))
    created_at: Mapped[datetime] = now()
    last_used_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]


def make_own(session: Session | Connection, user_id: uuid.UUID, name: str) -> None:
    """The project of a new account."""
    session.execute(insert(Project).values(id=user_id, name=name, personal=True).on_conflict_do_nothing())
    session.execute(insert(ProjectMember).values(project_id=user_id, user_id=user_id, role="admin").on_conflict_do_nothing())


@event.listens_for(User, "after_insert")
def _with_project(mapper: Any, connection: Connection, user: User) -> None:
    make_own(connection, user.id, user.name)
