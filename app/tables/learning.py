"""The reading room: which stops a person has done, and what came of each."""

from __future__ import annotations

import uuid
from datetime import datetime

from sqlalchemy import ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from app.tables._base import JSON, Base, new_key, now, of_project


class StopVisit(Base):
    """One time that a person did a stop of the reading room. What it started is in the tables of its kind; `refs` has the ids."""

    __tablename__ = "stop_visits"
    id: Mapped[uuid.UUID] = new_key()
    owner_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"))
    project_id: Mapped[uuid.UUID] = of_project()
    stop: Mapped[str] = mapped_column(comment="of app.learn")
    refs: Mapped[JSON] = mapped_column(comment="ids of what was started, and what was chosen")
    headline: Mapped[str | None] = mapped_column(comment="the result in one line, once there is one")
    created_at: Mapped[datetime] = now()
    done_at: Mapped[datetime | None]
    __table_args__ = (Index(None, "owner_id", "project_id", "stop", "created_at"),)
