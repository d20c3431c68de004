"""Uploaded files and the datasets parsed from them, with their issues and cached inspections."""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Any

from sqlalchemy import Computed, ForeignKey, Identity, Index, UniqueConstraint, false, text
from sqlalchemy.orm import Mapped, mapped_column

from app.tables._base import JSON, Base, Leased, new_key, now, of_project


class File(Base):
    """Uploaded bytes. Two files with equal bytes share one blob, found by `sha256`."""

    __tablename__ = "files"
    id: Mapped[uuid.UUID] = new_key()
    owner_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id"))
    project_id: Mapped[uuid.UUID] = of_project()
    sha256: Mapped[str] = mapped_column(index=True)
    bytes: Mapped[int]
    filename: Mapped[str]
    purpose: Mapped[str]
    status: Mapped[str] = mapped_column(server_default="uploaded", comment="uploaded, processed or error")
    status_details: Mapped[str | None]
    created_at: Mapped[datetime] = now()
    expires_at: Mapped[datetime | None]
    deleted_at: Mapped[datetime | None]
    __table_args__ = (Index(None, "project_id", "created_at"),)


class Dataset(Leased, Base):
    """A file parsed into rows of one format. Never changed in place: a fix makes a new version with `parent_id`.

    `status` goes reading → ready | error. `rows_path` is a Parquet file with the columns `line` (int64, the 1-based line or
    record of the source) and `row` (the normalized row as JSON; shapes in `app/formats/__init__.py`).
    """

    __tablename__ = "datasets"
    owner_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id"))
    project_id: Mapped[uuid.UUID] = of_project()
    file_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("files.id"), index=True)
    parent_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("datasets.id"), index=True)
    name: Mapped[str]
    tags: Mapped[list[Any]] = mapped_column(server_default=text("'[]'"))
    version: Mapped[int] = mapped_column(server_default="1")
    origin: Mapped[JSON | None] = mapped_column(comment="how this version came from its parents: operation and arguments")
    format: Mapped[str | None]
    format_chosen: Mapped[bool] = mapped_column(server_default=false(), comment="true when a person overruled the guess")
    task: Mapped[str | None]
    mapping: Mapped[JSON] = mapped_column(server_default=text("'{}'"), comment="field of the format → column of the file")
    edits: Mapped[list[Any] | None] = mapped_column(comment="what this version changes in its file's rows, see app/datasets/edits.py")
    status: Mapped[str] = mapped_column(server_default="reading")
    progress: Mapped[float | None] = mapped_column(comment="share of the bytes read so far, 0 to 1")
    error: Mapped[JSON | None] = mapped_column(comment="message, hint, line, column")
    rows: Mapped[int | None]
    good_rows: Mapped[int | None]
    rows_path: Mapped[str | None]
    rows_sha256: Mapped[str | None]
    report: Mapped[JSON | None] = mapped_column(comment="counts per rule, length histograms, label counts, preview")
    counted: Mapped[bool | None] = mapped_column(
        Computed("((report ? 'tokens'::text) OR (report ? 'uncountable'::text))", persisted=True)
    )  # which a sweep asks of all datasets: unpacking every report takes too long
    created_at: Mapped[datetime] = now()
    deleted_at: Mapped[datetime | None]
    __table_args__ = (
        Index(None, "project_id", "created_at"),
        Index("ix_datasets_live", "project_id", "file_id", "name", postgresql_where=text("deleted_at IS NULL")),
        Index("ix_datasets_filename", "project_id", text("(origin ->> 'filename')"), postgresql_where=text("deleted_at IS NULL")),
        Index("ix_datasets_uncounted", "created_at", postgresql_where=text("counted IS FALSE")),
        Index(None, "status", "lease_until"),
    )


class Finding(Base):
    """One issue of the report: its path in the row, the rule, the offending value and a fix."""

    __tablename__ = "findings"
    id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    dataset_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("datasets.id", ondelete="CASCADE"))
    line: Mapped[int | None]
    column: Mapped[str | None]
    rule: Mapped[str]
    severity: Mapped[str] = mapped_column(comment="error (the row is left out), warning or note")
    value: Mapped[str | None]
    message: Mapped[str]
    fix: Mapped[JSON | None] = mapped_column(comment="{label, operation, arguments}")
    __table_args__ = (Index(None, "dataset_id", "severity", "rule", "line"), Index(None, "dataset_id", "line"))


class Inspection(Leased, Base):
    """A cached question about a dataset that takes a child of the data worker: token counts of a model, rows as its trainer sees
    them, the two sides of a split."""

    __tablename__ = "inspections"
    dataset_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("datasets.id", ondelete="CASCADE"))
    model_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("models.id", ondelete="CASCADE"))
    kind: Mapped[str] = mapped_column(comment="lengths, rows or split")
    arguments: Mapped[JSON] = mapped_column(server_default=text("'{}'"))
    question: Mapped[str] = mapped_column(unique=True, comment="SHA-256 over dataset, model, kind and arguments")
    status: Mapped[str] = mapped_column(server_default="waiting", comment="waiting, running, ready or error")
    result: Mapped[JSON | None]
    error: Mapped[JSON | None]
    asked_at: Mapped[datetime] = now()
    __table_args__ = (Index(None, "dataset_id", "kind"),)


class Upload(Base):
    """A resumable upload (tus 1.0) that is not complete yet. Its bytes are in tmp/, and with an object storage in its pieces too."""

    __tablename__ = "uploads"
    id: Mapped[uuid.UUID] = new_key()
    owner_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), index=True)
    project_id: Mapped[uuid.UUID] = of_project()
    filename: Mapped[str]
    purpose: Mapped[str]
    wishes: Mapped[JSON] = mapped_column(server_default=text("'{}'"), comment="name and format for the dataset")
    length: Mapped[int]
    path: Mapped[str]
    file_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("files.id"), comment="set once all bytes are there")
    dataset_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("datasets.id"))
    created_at: Mapped[datetime] = now()
    expires_at: Mapped[datetime]


class UploadPiece(Base):
    """Bytes of an upload that is not complete yet, in the object storage: whichever web process goes on with it has them."""

    __tablename__ = "upload_pieces"
    id: Mapped[uuid.UUID] = new_key()
    upload_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("uploads.id", ondelete="CASCADE"))
    start: Mapped[int | None] = mapped_column(comment="byte of the file that it begins at; null: a part whose place is said at the end")
    bytes: Mapped[int]
    path: Mapped[str] = mapped_column(unique=True, comment="its place in the object storage")
    __table_args__ = (UniqueConstraint("upload_id", "start"),)
