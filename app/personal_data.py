"""Everything that one person has in the studio: as an archive, and removed; and everything in one project, removed.

What belongs to a person is found in the tables: the person's own project, rows that refer to the person, and rows that go with such a
row (`ON DELETE CASCADE`). What is in a project likewise. A new table needs no edit here.
"""

from __future__ import annotations

import functools
import json
import shutil
import uuid
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, Table, delete, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app.db import on_commit, transaction
from app.errors import Conflict, NotFound
from app.kit import ids
from app.languages import gettext
from app.settings import get_settings
from app.storage import atomic, files, places
from app.tables import Base, Dataset, Evaluation, Export, File, Job, Model, Project, User

Mine = Callable[[Any], ColumnElement[bool]]
"""The condition of the rows of a table that are meant."""
SECRETS = ("password_hash", "token_sha256", "secret_sha256")
"""Columns that are no data about a person."""


def find(session: Session, name: str) -> User:
    """The person of that name. Raises NotFound."""
    user = session.scalar(select(User).where(User.name == name))
    if user is None:
        raise NotFound(f"There is no account “{name[:80]}”.", hint="Use the name as the Settings page shows it.", param="name")
    return user


def belonging(user: User) -> dict[Table, ColumnElement[bool]]:
    """For each table that has something of a person, the condition of those rows; parents before children."""
    people, projects = Base.metadata.tables["users"], Base.metadata.tables["projects"]
    return _closure({people: people.c.id == user.id, projects: projects.c.id == user.id}, people, user.id)


def inside(project: Project) -> dict[Table, ColumnElement[bool]]:
    """For each table that has something of a project, the condition of those rows; parents before children."""
    projects = Base.metadata.tables["projects"]
    return _closure({projects: projects.c.id == project.id}, projects, project.id, but="SET NULL")


def _closure(found: dict[Table, ColumnElement[bool]], root: Table, key: uuid.UUID, but: str = "") -> dict[Table, ColumnElement[bool]]:
    """`found`, with what refers to this row of `root`, other than by references that are `but` emptied, and what goes with all that."""
    for table in Base.metadata.sorted_tables:
        ways: list[ColumnElement[bool]] = []
        for reference in table.foreign_keys:
            target = reference.column.table
            if target is root and not (but and reference.ondelete == but):
                ways.append(reference.parent == key)
            elif reference.ondelete == "CASCADE" and target in found and target is not table:
                ways.append(reference.parent.in_(select(reference.column).where(found[target])))
        if ways and table is not root:
            found[table] = or_(*ways)
    return found


# The archive ------------------------------------------------------------------------------------------------------------


def export(session: Session, user: User, target: Path) -> dict[str, int]:
    """Write all data of a person to a zip: `data/<table>.jsonl`, and the files, datasets, models and exports. Returns rows by table.

    Raises Conflict when the file exists, DiskFull.
    """
    if target.exists():
        raise Conflict(f"{target} exists.", hint="Name a new file.")
    counts: dict[str, int] = {}
    partial = target.with_name(f"{target.name}.partial")
    try:
        with atomic.disk_errors(), zipfile.ZipFile(partial, "x", zipfile.ZIP_DEFLATED) as archive:
            for table, mine in belonging(user).items():
                counts[table.name] = _write_rows(session, archive, table, mine)
            for name, path in _files_of(session, user):
                archive.write(path, name)
        partial.chmod(0o600)
        partial.rename(target)
    finally:
        partial.unlink(missing_ok=True)
    return counts


def _write_rows(session: Session, archive: zipfile.ZipFile, table: Table, mine: ColumnElement[bool]) -> int:
    count = 0
    with archive.open(f"data/{table.name}.jsonl", "w", force_zip64=True) as file:
        for row in session.execute(select(*(c for c in table.c if c.name not in SECRETS)).where(mine)).mappings():
            file.write(json.dumps(dict(row), default=str, ensure_ascii=False).encode() + b"\n")
            count += 1
    return count


def _files_of(session: Session, user: User) -> Iterator[tuple[str, Path]]:
    """(name in the archive, path) of every file on disk that is the person's."""
    for file in session.scalars(select(File).where(File.owner_id == user.id, File.deleted_at.is_(None))):
        yield f"files/{ids.public(ids.FILE, file.id)}-{file.filename}", files.brought(file.sha256)
    for dataset in session.scalars(select(Dataset).where(Dataset.owner_id == user.id, Dataset.deleted_at.is_(None))):
        if dataset.rows_path and (rows := places.path(dataset.rows_path)).is_file():
            yield f"datasets/{ids.public(ids.DATASET, dataset.id)}.parquet", rows
    for top, folder in _folders_of(session, lambda table: table.owner_id == user.id, bring=True):
        yield from ((f"{top}/{path.relative_to(folder.parent).as_posix()}", path) for path in sorted(folder.rglob("*")) if path.is_file())


def _folders_of(session: Session, mine: Mine, bring: bool = False) -> Iterator[tuple[str, Path]]:
    """(kind, folder) of models, runs, evaluations and exports that are there; with `bring` after bringing what is stored of them."""
    root = get_settings().data_dir
    for table, top in ((Model, "models"), (Job, "runs"), (Evaluation, "evaluations"), (Export, "exports")):
        for key in session.scalars(select(table.id).where(mine(table))):
            if bring:
                places.bring_all(f"{top}/{key}")
            if (folder := root / top / str(key)).is_dir():
                yield top, folder


# Removal ----------------------------------------------------------------------------------------------------------------


def remove(session: Session, user: User) -> dict[str, int]:
    """Delete a person with all that belongs to the account: rows at once, files after the commit. Returns rows by table.

    Raises Conflict while something of the person's is being worked on, or is used by another person.
    """
    return _remove(session, user.name, "person", belonging(user), lambda table: table.owner_id == user.id)


def remove_project(session: Session, project: Project) -> dict[str, int]:
    """Delete a project with all that is in it, in the same way. What was used of the machine stays, without a project.

    Raises Conflict while something in it is being worked on, or is used from another project.
    """
    return _remove(session, project.name, "project", inside(project), lambda table: table.project_id == project.id)


def _remove(session: Session, name: str, kind: str, rows: dict[Table, ColumnElement[bool]], mine: Mine) -> dict[str, int]:
    for table, condition in rows.items():
        if "lease_until" in table.c and session.scalar(select(table.c.id).where(condition, table.c.lease_until.is_not(None)).limit(1)):
            message = gettext("Something of %(name)s is running (%(what)s).", name=name, what=table.name)
            raise Conflict(message, hint=gettext("Cancel it first, or wait for its end."))
    root = get_settings().data_dir
    folders = [folder for _, folder in _folders_of(session, mine)]
    datasets = session.scalars(select(Dataset.id).where(mine(Dataset)))
    folders += [root / "rows" / str(key) for key in datasets]
    keys = session.scalars(select(Evaluation.id).where(mine(Evaluation))).all()
    blobs = session.execute(select(File.sha256, File.bytes).where(mine(File)).distinct()).all()
    counts: dict[str, int] = {}
    try:
        with session.begin_nested():
            session.execute(update(Model).where(mine(Model)).values(job_id=None))  # models and jobs refer to each other
            for table, condition in reversed(rows.items()):
                counts[table.name] = _delete(session, table, condition)
    except IntegrityError as error:
        detail = str(getattr(error.orig, "diag", None) and error.orig.diag.message_detail)  # type: ignore[union-attr]
        if kind == "project":
            message = gettext("Something of %(name)s is used by another project: %(detail)s", name=name, detail=detail)
        else:
            message = gettext("Something of %(name)s is used by another person: %(detail)s", name=name, detail=detail)
        raise Conflict(message, hint=gettext("Delete or hand over that first.")) from None
    for folder in folders:
        on_commit(session, functools.partial(shutil.rmtree, folder, ignore_errors=True))
    for key in keys:
        on_commit(session, functools.partial((root / "predictions" / f"{key.hex}.jsonl").unlink, missing_ok=True))
    on_commit(session, functools.partial(_forget_blobs, [files.Blob(*blob) for blob in blobs]))
    return counts


def _delete(session: Session, table: Table, condition: ColumnElement[bool]) -> int:
    done: Any = session.execute(delete(table).where(condition))
    return int(done.rowcount)


def _forget_blobs(blobs: list[files.Blob]) -> None:
    with transaction() as session:
        for blob in blobs:
            files.discard_if_unused(session, blob)


__all__ = ["belonging", "export", "find", "inside", "remove", "remove_project"]
