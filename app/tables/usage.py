"""What was used: which attempt of whose work held a train worker and how long, and the tokens of answers."""

from __future__ import annotations

import uuid
from datetime import date, datetime

from sqlalchemy import Date, ForeignKey, Index, text
from sqlalchemy.orm import Mapped, mapped_column

from app.tables._base import Base, new_key, now


class MachineUse(Base):
    """One attempt at a job or an evaluation. A trigger of those tables opens it with the claim and closes it where the lease ends, by
    whatever way; it stays when the work is deleted."""

    __tablename__ = "machine_uses"
    id: Mapped[uuid.UUID] = new_key()
    user_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), comment="whose work it was then")
    project_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("projects.id", ondelete="SET NULL"), comment="null: it was deleted")
    kind: Mapped[str] = mapped_column(comment="jobs or evaluations")
    row_id: Mapped[uuid.UUID] = mapped_column(comment="of the job or evaluation")
    fence: Mapped[int]
    gpus: Mapped[int] = mapped_column(server_default="0", comment="GPUs that it held; 0 where it ran on the CPU")
    joules: Mapped[float | None] = mapped_column(comment="energy of those GPUs; null where they do not count it")
    started_at: Mapped[datetime] = now()
    ended_at: Mapped[datetime | None]
    __table_args__ = (
        Index(None, "row_id", "fence"),
        Index(None, "user_id", "started_at"),
        Index(None, "project_id", "started_at"),
        Index("ix_machine_uses_open", "row_id", postgresql_where=text("ended_at IS NULL")),
    )


class TokenUse(Base):
    """Tokens that models read and wrote for a person in a project on one day. It stays when the answers are removed."""

    __tablename__ = "token_uses"
    user_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), primary_key=True)
    project_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("projects.id", ondelete="CASCADE"), primary_key=True)
    day: Mapped[date] = mapped_column(Date, primary_key=True, comment="of UTC")
    read: Mapped[int] = mapped_column(server_default="0", comment="tokens of prompts")
    written: Mapped[int] = mapped_column(server_default="0", comment="tokens of answers")
    encoded: Mapped[int] = mapped_column(server_default="0", comment="of those read, the tokens of texts that were embedded or classified")
    __table_args__ = (Index(None, "day"),)
