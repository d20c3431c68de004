"""Datasets: files parsed into rows, with a report. A dataset is never changed in place; every change is a new version.

    create ─→ reading ─→ ready | error          (parsing: `app/datasets/ingest_task.py`)

Versions that fix, edit or combine come from `app/datasets/versions.py` and `app/datasets/compose.py`.
"""

from __future__ import annotations

import re
import shutil
import uuid
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from sqlalchemy import ColumnElement, Select, exists, func, insert, literal, or_, select
from sqlalchemy.orm import Session, aliased, defer

from app import db, formats, queue
from app.datasets import readers
from app.datasets.ingest import VERSION
from app.errors import BadField, Conflict
from app.formats._messages import known_role
from app.kit import ids, once
from app.languages import gettext
from app.ownership import either, mine, owned
from app.settings import get_settings
from app.spec import DatasetRef
from app.storage import files, places
from app.tables import Dataset, File, Finding, Job, User

UNFINISHED = ("queued", "running", "paused")


class DatasetStats(BaseModel):
    """Totals over the valid rows. Token counts are None until a model's tokenizer has counted them."""

    rows: int
    characters: int
    tokens: int | None = None
    trained_tokens: int | None = None
    longest: int | None = None
    labels: int | None = None


# Making ---------------------------------------------------------------------------------------------------------------


def create(
    session: Session, user: User, file: File, name: str | None = None, format: str | None = None, mapping: dict[str, str] | None = None
) -> Dataset:
    """A dataset of this file, whose parsing is enqueued; ready at once when the same bytes were parsed the same way before.

    `format` and `mapping` overrule the detection. Raises Unsupported for an unsupported extension, BadField for an unknown
    format.
    """
    readers.kind_of(file.filename)
    if format:
        formats.get(format)
    dataset = Dataset(
        id=uuid.uuid4(),
        owner_id=user.id,
        project_id=user.project_id,
        file_id=file.id,
        name=(name or Path(file.filename).name.split(".")[0] or file.filename).strip()[:200],
        version=1,
        format=format,
        format_chosen=bool(format),
        mapping=mapping or {},
        origin={"operation": "upload", "filename": file.filename},
    )
    return order(session, dataset, file)


def read_as(session: Session, user: User, dataset: Dataset, format: str, mapping: dict[str, str] | None = None) -> Dataset:
    """A new version of a dataset: the same file, parsed with another format or mapping."""
    formats.get(format)
    file = file_of(session, dataset)
    version = session.scalar(select(func.max(Dataset.version)).where(Dataset.id.in_(family(session, dataset)))) or dataset.version
    new = Dataset(
        id=uuid.uuid4(),
        owner_id=user.id,
        project_id=user.project_id,
        file_id=dataset.file_id,
        parent_id=dataset.id,
        name=dataset.name,
        version=version + 1,
        format=format,
        format_chosen=True,
        mapping=mapping or {},
        edits=dataset.edits,
        origin={"operation": "read_as", "format": format, "mapping": mapping or {}, "from": ids.public(ids.DATASET, dataset.id)},
    )
    return order(session, new, file)


def order(session: Session, dataset: Dataset, file: File) -> Dataset:
    """Enqueue the parsing of a new dataset of `file`, unless an equal one exists."""
    if dataset.parent_id is not None:
        dataset.tags = session.get_one(Dataset, dataset.parent_id).tags
    twin = _twin(session, dataset, file) if not dataset.edits else None
    if twin is not None:
        _copy_reading(session, twin, dataset)
        file.status = "processed"
    else:
        dataset.status = "reading"
        session.add(dataset)
        session.flush()
        queue.enqueue(session, queue.READ, dataset.id)
    session.flush()
    session.refresh(dataset)
    return dataset


def _twin(session: Session, dataset: Dataset, file: File) -> Dataset | None:
    """A dataset of the same bytes, the same extension and the same settings, whose result can be reused."""
    query = (
        select(Dataset, File.filename)
        .join(File, File.id == Dataset.file_id)
        .where(
            Dataset.project_id == dataset.project_id, Dataset.status == "ready", Dataset.deleted_at.is_(None), File.sha256 == file.sha256
        )
        .where(Dataset.edits.is_(None))
        .where(Dataset.format_chosen == dataset.format_chosen, Dataset.report["version"].as_integer() == VERSION)
        .where(or_(Dataset.origin["operation"].astext.in_(("upload", "read_as")), Dataset.origin.is_(None)))
        .order_by(Dataset.created_at.desc())
        .limit(20)
    )
    for other, filename in session.execute(query):
        wishes = not dataset.format_chosen or (
            other.format == dataset.format and (other.origin or {}).get("mapping", {}) == dataset.mapping
        )
        same = Path(filename).suffixes[-2:] == Path(file.filename).suffixes[-2:]
        if wishes and same and other.rows_path and places.exists(other.rows_path):
            return other
    return None


def _copy_reading(session: Session, twin: Dataset, dataset: Dataset) -> None:
    for column in ("format", "task", "mapping", "status", "rows", "good_rows", "rows_path", "rows_sha256", "report"):
        setattr(dataset, column, getattr(twin, column))
    session.add(dataset)
    session.flush()
    columns = ["line", "column", "rule", "severity", "value", "message", "fix"]
    source = (
        select(literal(dataset.id), *[getattr(Finding, column) for column in columns])
        .where(Finding.dataset_id == twin.id)
        .order_by(Finding.id)
    )
    session.execute(insert(Finding).from_select(["dataset_id", *columns], source))


def file_of(session: Session, dataset: Dataset) -> File:
    """The file it is parsed from. Raises Conflict when it was deleted."""
    file = session.get(File, dataset.file_id) if dataset.file_id else None
    if file is None or file.deleted_at is not None or not files.is_kept(file.sha256):
        said = gettext("The file of this dataset was deleted, so it cannot be read again.")
        raise Conflict(said, hint=gettext("Upload the file again."))
    return file


# Finding --------------------------------------------------------------------------------------------------------------


def get(session: Session, user: User, dataset_id: uuid.UUID) -> Dataset:
    """A dataset of this user. Raises NotFound, also for another person's."""
    return owned(session, Dataset, user, dataset_id)


def for_file(session: Session, user: User, file_id: uuid.UUID) -> Dataset:
    """The newest dataset of a file that is ready or may become so, else the newest. Raises NotFound for an unknown file, BadField
    for one that is no dataset."""
    file = files.get(session, user, file_id)
    query = _readings(file.id).where(Dataset.project_id == user.project_id).order_by(_GAVE_NOTHING, *_NEWEST)
    dataset = session.scalars(query.limit(1)).first()
    if dataset is None:
        raise BadField(
            gettext(
                "The file %(file)s was uploaded with the purpose “%(purpose)s” and is not a dataset.",
                file=file.filename,
                purpose=file.purpose,
            ),
            hint=gettext("Upload it with purpose fine-tune."),
            param="file_id",
        )
    return dataset


_GAVE_NOTHING = or_(Dataset.status == "error", (Dataset.status == "ready") & (func.coalesce(Dataset.good_rows, 0) == 0))
_NEWEST = (Dataset.version.desc(), Dataset.created_at.desc())


def _readings(file_id: uuid.UUID | None) -> Select[Dataset]:
    """The datasets that a file's id may stand for: unedited ones, since an edited version has an id of its own."""
    return select(Dataset).where(Dataset.file_id == file_id, Dataset.edits.is_(None), Dataset.deleted_at.is_(None))


def failed_later(session: Session, dataset: Dataset) -> Dataset | None:
    """The newest dataset of the same file that failed after this one was parsed, which is therefore used in its place."""
    return once.of(("failed later", dataset.id), lambda: _failed_later(session, dataset))


def _failed_later(session: Session, dataset: Dataset) -> Dataset | None:
    if dataset.edits is not None or dataset.file_id is None:
        return None
    own = _readings(dataset.file_id).where(Dataset.project_id == dataset.project_id, Dataset.version > dataset.version)
    newest = session.scalars(own.order_by(*_NEWEST).limit(1)).first()
    return newest if newest is not None and (newest.status == "error" or (newest.status == "ready" and not newest.good_rows)) else None


def list_(session: Session, user: User) -> list[Dataset]:
    """This user's datasets, newest first."""
    return list(session.scalars(mine(Dataset, user).order_by(*_LATEST)))


_LATEST = (Dataset.created_at.desc(), Dataset.id)
OFFERED = 80  # an older one is offered where a link names it


def offered(session: Session, user: User, *named: str | None) -> list[Dataset]:
    """What a form offers, newest first: the newest datasets, and those whose public ids are named; their reports, which may be long, are
    read one by one where one is looked at."""
    newest = mine(Dataset, user).with_only_columns(Dataset.id).order_by(*_LATEST).limit(OFFERED)
    keys = [ids.parse(ids.DATASET, name) for name in named if name and re.fullmatch(r"ds-[0-9a-f]{32}", name)]
    chosen = either(newest, select(Dataset.id).where(Dataset.id.in_(keys)))
    return list(session.scalars(mine(Dataset, user, Dataset.id.in_(chosen)).options(defer(Dataset.report)).order_by(*_LATEST)))


def lines(user: User) -> Select[uuid.UUID | None, str]:
    """(file, name) of the lines of a list of datasets: one for all versions of a file under one name."""
    return mine(Dataset, user).with_only_columns(Dataset.file_id, Dataset.name).distinct()


def newest_versions(user: User) -> tuple[ColumnElement[bool], ...]:
    """The conditions of the datasets that a list shows, of each line the newest. Those with a file and those without are asked for apart,
    each by its index."""
    other = aliased(Dataset)
    later = (other.created_at > Dataset.created_at) | ((other.created_at == Dataset.created_at) & (other.id < Dataset.id))
    same = (other.project_id == Dataset.project_id) & (other.name == Dataset.name) & other.deleted_at.is_(None)
    of_files = exists().where(same, other.file_id == Dataset.file_id, later)
    without = exists().where(same, other.file_id.is_(None), Dataset.file_id.is_(None), later)
    return Dataset.project_id == user.project_id, Dataset.deleted_at.is_(None), ~of_files, ~without


def family(session: Session, dataset: Dataset) -> list[uuid.UUID]:
    """Ids of this dataset, all its ancestors and all their descendants."""
    known = {dataset.id}
    edge = {dataset.id} | ({dataset.parent_id} if dataset.parent_id else set())
    while edge - known or edge == {dataset.id}:
        known |= edge
        rows = session.execute(select(Dataset.id, Dataset.parent_id).where(or_(Dataset.id.in_(known), Dataset.parent_id.in_(known))))
        edge = {key for row in rows for key in row if key is not None}
        if edge <= known:
            break
    return list(known)


def versions(session: Session, dataset: Dataset) -> list[Dataset]:
    """Every version of a dataset that is not deleted, oldest first."""
    query = select(Dataset).where(Dataset.id.in_(family(session, dataset)), Dataset.deleted_at.is_(None))
    return list(session.scalars(query.order_by(Dataset.version, Dataset.created_at)))


def line(session: Session, dataset: Dataset) -> list[Dataset]:
    """The versions that a list shows as one: of the same file, under the same name."""
    same = Dataset.file_id == dataset.file_id if dataset.file_id else Dataset.file_id.is_(None)
    own = select(Dataset).where(Dataset.project_id == dataset.project_id, Dataset.deleted_at.is_(None))
    return list(session.scalars(own.where(same, Dataset.name == dataset.name)))


def with_rows(session: Session, user: User, *named: str | None) -> list[Dataset]:
    """Those of `offered` that are ready and have a valid row, so that they can be scored, mapped and prompted with."""
    return [d for d in offered(session, user, *named) if d.status == "ready" and d.good_rows]


def trainable(dataset: Dataset) -> bool:
    """Whether there are rows to train on. True while that is unknown, since a job may wait for a dataset that is
    being parsed."""
    return dataset.good_rows != 0


def usual_task(dataset: Dataset) -> str | None:
    """The default objective of a job on these rows."""
    return formats.get(dataset.format).task if dataset.format else dataset.task


# Telling --------------------------------------------------------------------------------------------------------------


def reference(dataset: Dataset) -> DatasetRef:
    """The reference by which a trainer reads the rows. Its `format` is the shape of the rows. Raises Conflict before the dataset
    is ready."""
    if dataset.status != "ready" or not dataset.rows_path or not dataset.rows_sha256 or not dataset.format:
        said = gettext("The dataset %(name)s is %(status)s, not ready.", name=dataset.name, status=gettext(dataset.status))
        raise Conflict(said, hint=gettext("Wait until it is read, or look at its report."))
    return DatasetRef(
        id=dataset.id,
        name=dataset.name,
        path=dataset.rows_path,
        sha256=dataset.rows_sha256,
        format=formats.get(dataset.format).shape,
        rows=dataset.good_rows or 0,
    )


def stats(dataset: Dataset) -> DatasetStats:
    report = dataset.report or {}
    return DatasetStats(
        rows=dataset.good_rows or 0,
        characters=report.get("characters", 0),
        tokens=report.get("tokens"),
        trained_tokens=report.get("trained_tokens"),
        longest=report.get("longest"),
        labels=report.get("label_count"),
    )


def preview(dataset: Dataset, n: int = 10) -> list[dict[str, Any]]:
    """The first normalized rows, long texts shortened."""
    return [item["row"] for item in (dataset.report or {}).get("preview", [])[:n]]


def rules(dataset: Dataset) -> list[dict[str, Any]]:
    """Findings by rule: errors first, then by count. Keys: rule, severity, count, message (an example)."""
    order = {"error": 0, "warning": 1, "note": 2}
    found = [{"rule": rule, **entry} for rule, entry in (dataset.report or {}).get("findings", {}).items()]
    return sorted(found, key=lambda entry: (order.get(entry["severity"], 3), -entry["count"], entry["rule"]))


def unknown_roles(dataset: Dataset) -> list[dict[str, Any]]:
    """Speakers whose rows are excluded until somebody assigns them a role: role, messages, and suggested or None."""
    found = (dataset.report or {}).get("unknown_roles", {})
    return [{"role": role, "messages": count, "suggested": known_role(role)} for role, count in found.items()]


ORDERS: dict[str, tuple[Any, ...]] = {"line": (), "rule": (Finding.rule,), "severity": (Finding.severity,)}
"""Sort orders of findings."""


def findings(
    session: Session,
    dataset: Dataset,
    rule: str | None = None,
    severity: str | None = None,
    sort: str = "line",
    after: int = 0,
    limit: int = 50,
) -> tuple[list[Finding], bool]:
    """One page of findings and whether there are more. `sort` is line, rule or severity; `after` is the number of findings before it."""
    query: Select[Finding] = select(Finding).where(Finding.dataset_id == dataset.id)
    if rule:
        query = query.where(Finding.rule == rule)
    if severity:
        query = query.where(Finding.severity == severity)
    if sort not in ORDERS:
        said = gettext("Issues cannot be sorted by “%(order)s”.", order=sort[:40])
        raise BadField(said, hint=gettext("Use line, rule or severity."), param="sort")
    query = query.order_by(*ORDERS[sort], Finding.line, Finding.id).offset(after).limit(limit + 1)
    rows = list(session.scalars(query))
    return rows[:limit], len(rows) > limit


def at_line(session: Session, dataset: Dataset, line: int) -> list[Finding]:
    """The findings of one line."""
    return list(
        session.scalars(select(Finding).where(Finding.dataset_id == dataset.id, Finding.line == line).order_by(Finding.id).limit(50))
    )


def delete(session: Session, user: User, dataset: Dataset) -> None:
    """Delete a dataset, unless an unfinished job needs it. Its rows are removed once no other version shares them."""
    job = session.scalars(
        select(Job).where(
            or_(Job.dataset_id == dataset.id, Job.validation_dataset_id == dataset.id), Job.status.in_(UNFINISHED), Job.deleted_at.is_(None)
        )
    ).first()
    if job is not None:
        raise Conflict(
            gettext(
                "The job “%(job)s” (%(status)s) still needs the dataset %(name)s.",
                job=job.name,
                status=gettext(job.status),
                name=dataset.name,
            ),
            hint=gettext("Cancel %(id)s first, or wait until it has finished.", id=ids.public(ids.JOB, job.id)),
        )
    dataset.deleted_at = func.clock_timestamp()
    session.flush()
    path = dataset.rows_path
    if path and not session.scalar(select(Dataset.id).where(Dataset.rows_path == path, Dataset.deleted_at.is_(None)).limit(1)):
        folder = (get_settings().data_dir / path).parent
        db.on_commit(session, lambda: shutil.rmtree(folder, ignore_errors=True))


def delete_line(session: Session, user: User, dataset: Dataset) -> None:
    """Delete a dataset with all the versions that a list shows as one. Raises Conflict, and then none is deleted."""
    for version in line(session, dataset):
        delete(session, user, version)


def delete_file(session: Session, user: User, file_id: uuid.UUID) -> File:
    """Delete a file and the datasets parsed from it. Raises Conflict when an unfinished job needs one of them."""
    for dataset in session.scalars(
        select(Dataset).where(Dataset.file_id == file_id, Dataset.project_id == user.project_id, Dataset.deleted_at.is_(None))
    ):
        delete(session, user, dataset)
    return files.delete(session, user, file_id)
