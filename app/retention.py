"""Retention: what is removed by itself, after how many days, and what that would be now.

Each rule has a setting, in days; without it nothing is ever removed by the rule. The reaper applies them once an hour; the page
Admin and `luthier retention --preview` show what would go.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Table, delete, func, select, text, update
from sqlalchemy.orm import Session

from app.db import on_commit, touched
from app.languages import mark
from app.leases import now
from app.models import exports
from app.settings import get_settings
from app.storage import places
from app.tables import Base, Checkpoint, Evaluation, Exchange, Export, Job, User

EVERY_SECONDS = 3600.0
AT_MOST = 1000
"""Things that one rule removes in one round, so that no round holds locks for long."""
ENDED = ("succeeded", "failed", "cancelled")
_LOCK = 7_314_159_266


class Due(NamedTuple):
    """One thing that a rule would remove: the row's key, or the path of a file."""

    key: Any
    bytes: int = 0


@dataclass(frozen=True)
class RetentionRule:
    name: str
    title: str
    setting: str
    due: Callable[[Session, ColumnElement[datetime], int | None], Sequence[Due]]
    """`due(session, before, at_most)`: what is older, oldest first."""
    remove: Callable[[Session, Sequence[Due]], None]

    @property
    def days(self) -> float | None:
        found: float | None = getattr(get_settings(), self.setting)
        return found


@dataclass(frozen=True)
class RetentionPreview:
    """What a rule would remove now."""

    rule: RetentionRule
    count: int
    bytes: int


def preview(session: Session) -> list[RetentionPreview]:
    """All rules; 0 for one that has no setting."""
    found = []
    for rule in RULES:
        due = rule.due(session, _before(rule.days), None) if rule.days is not None else []
        found.append(RetentionPreview(rule, len(due), sum(one.bytes for one in due)))
    return found


def apply(session: Session) -> dict[str, int]:
    """One round of all rules that have a setting. Returns how many things each removed; nothing while another process is at it."""
    if not session.scalar(select(func.pg_try_advisory_xact_lock(_LOCK))):
        return {}
    removed = {}
    for rule in RULES:
        if rule.days is not None and (due := rule.due(session, _before(rule.days), AT_MOST)):
            rule.remove(session, due)
            removed[rule.name] = len(due)
    return removed


def _before(days: float | None) -> ColumnElement[datetime]:
    return now() - timedelta(days=days or 0)


# The rules ------------------------------------------------------------------------------------------------------------


def _exchanges(session: Session, before: ColumnElement[datetime], at_most: int | None) -> list[Due]:
    """Conversations and calls of the API; those that a person saved under a title stay."""
    old = select(Exchange.id).where(Exchange.created_at < before, Exchange.title.is_(None)).order_by(Exchange.created_at)
    return [Due(key) for key in session.scalars(old.limit(at_most))]


def _remove_exchanges(session: Session, due: Sequence[Due]) -> None:
    session.execute(delete(Exchange).where(Exchange.id.in_([one.key for one in due])))  # their answers go with them


def _logs(session: Session, before: ColumnElement[datetime], at_most: int | None) -> list[Due]:
    """Logs of the attempts of jobs and evaluations that ended. What is in the object storage alone counts no bytes."""
    root, found = get_settings().data_dir, list[Due]()
    stored: dict[str, list[Path]] = {}
    for name in places.stored("runs", "*/a*/trainer.log*"):
        stored.setdefault(name.split("/")[1], []).append(root / name)
    for table, folder, pattern in ((Job, "runs", "a*/trainer.log*"), (Evaluation, "evaluations", "a*/assess.log*")):
        ended = select(table.id).where(table.status.in_(ENDED), table.finished_at < before).order_by(table.finished_at)
        for key in session.scalars(ended):
            here = {path: path.stat().st_size for path in sorted((root / folder / str(key)).glob(pattern)) if path.is_file()}
            there = dict.fromkeys(stored.get(str(key), ()), 0)
            found += [Due(path, size) for path, size in {**there, **here}.items()]
            if at_most is not None and len(found) >= at_most:
                return found[:at_most]
    return found


def _remove_files(session: Session, due: Sequence[Due]) -> None:
    for one in due:
        on_commit(session, functools.partial(Path(one.key).unlink, missing_ok=True))
        on_commit(session, functools.partial(places.forget, Path(one.key).relative_to(get_settings().data_dir).as_posix()))


def _checkpoints(session: Session, before: ColumnElement[datetime], at_most: int | None) -> list[Due]:
    """Checkpoints of jobs that ended. Models that were kept from them, and a job's result, are folders of their own."""
    old = select(Checkpoint.id, Checkpoint.bytes).join(Job, Job.id == Checkpoint.job_id)
    old = old.where(Checkpoint.deleted_at.is_(None), Job.status.in_(ENDED), Job.finished_at < before).order_by(Job.finished_at)
    return [Due(*row) for row in session.execute(old.limit(at_most))]


def _remove_checkpoints(session: Session, due: Sequence[Due]) -> None:
    keys = [one.key for one in due]
    gone = update(Checkpoint).where(Checkpoint.id.in_(keys)).values(deleted_at=now()).returning(Checkpoint.path)
    for path in session.scalars(gone):
        on_commit(session, functools.partial(shutil.rmtree, get_settings().data_dir / path, ignore_errors=True))


def _exports(session: Session, before: ColumnElement[datetime], at_most: int | None) -> list[Due]:
    old = select(Export.id, Export.files).where(Export.deleted_at.is_(None), Export.status.in_(ENDED), Export.finished_at < before)
    rows = session.execute(old.order_by(Export.finished_at).limit(at_most))
    return [Due(key, sum(file.get("bytes", 0) for file in files)) for key, files in rows]


def _remove_exports(session: Session, due: Sequence[Due]) -> None:
    for export in session.scalars(select(Export).where(Export.id.in_([one.key for one in due]))):
        exports.delete(session, session.get_one(User, export.owner_id), export.id)


def _deleted(session: Session, before: ColumnElement[datetime], at_most: int | None) -> list[Due]:
    """Rows of deleted things, which stay for the history, once nothing refers to them any more."""
    found: list[Due] = []
    for table in reversed(Base.metadata.sorted_tables):
        if "deleted_at" in table.c:
            left = None if at_most is None else at_most - len(found)
            old = select(table.c.id).where(table.c.deleted_at < before, *_unused(table)).order_by(table.c.deleted_at).limit(left)
            found += [Due((table, key)) for key in session.scalars(old)]
    return found


def _unused(table: Table) -> Iterable[ColumnElement[bool]]:
    """No row refers to it, but for those that go with it."""
    for other in Base.metadata.tables.values():
        for key in other.foreign_keys:
            if key.column.table is table and key.ondelete is None:
                referring = other.alias()
                yield ~select(text("1")).select_from(referring).where(referring.c[key.parent.name] == table.c.id).exists()


def _remove_deleted(session: Session, due: Sequence[Due]) -> None:
    for table in reversed(Base.metadata.sorted_tables):
        if keys := [one.key[1] for one in due if one.key[0] is table]:
            touched(session, delete(table).where(table.c.id.in_(keys), *_unused(table)))


RULES = (
    RetentionRule(
        "playground", mark("Conversations of the playground and answers of the API"), "keep_playground_days", _exchanges, _remove_exchanges
    ),
    RetentionRule("logs", mark("Logs of runs and evaluations that ended"), "keep_log_days", _logs, _remove_files),
    RetentionRule("checkpoints", mark("Checkpoints of runs that ended"), "keep_checkpoint_days", _checkpoints, _remove_checkpoints),
    RetentionRule("exports", mark("Exports"), "keep_export_days", _exports, _remove_exports),
    RetentionRule("deleted", mark("Records of what was deleted"), "keep_deleted_days", _deleted, _remove_deleted),
)
