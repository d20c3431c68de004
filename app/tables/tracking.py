"""Jobs in trackers: what of each was sent where."""

from __future__ import annotations

import uuid
from datetime import datetime

from sqlalchemy import ForeignKey, Index, UniqueConstraint, text
from sqlalchemy.orm import Mapped, mapped_column

from app.tables._base import JSON, Base, Leased, new_key, now


class TrackedRun(Leased, Base):
    """A job in one tracker, and how far its events were sent. States in `app/tracking/service.py`."""

    __tablename__ = "tracked_runs"
    id: Mapped[uuid.UUID] = new_key()
    job_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    kind: Mapped[str] = mapped_column(comment="of app.trackers")
    wish: Mapped[JSON] = mapped_column(comment="what the order says of the tracker")
    status: Mapped[str] = mapped_column(server_default="queued", comment="queued, running, or failed after deaths of its workers")
    last_event_id: Mapped[int] = mapped_column(server_default="0", comment="of the job's events all that were before were sent")
    sent_steps: Mapped[JSON] = mapped_column(server_default=text("'{}'"), comment="type of event → the last step that was sent")
    state: Mapped[JSON] = mapped_column(server_default=text("'{}'"), comment="what the tracker keeps: its id and address of the run")
    tries: Mapped[int] = mapped_column(server_default="0", comment="that failed, since one succeeded")
    error: Mapped[str | None] = mapped_column(comment="why the last try failed")
    next_at: Mapped[datetime] = now()
    sent_at: Mapped[datetime | None]
    created_at: Mapped[datetime] = now()
    __table_args__ = (UniqueConstraint("job_id", "kind"), Index(None, "status", "next_at"))
