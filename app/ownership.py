"""Objects of a person. Another person's object, and one that was deleted, is as if it were not there."""

from __future__ import annotations

import uuid
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import ColumnElement, Select, select
from sqlalchemy.orm import Session

from app.errors import NotFound
from app.kit import ids
from app.tables import Comparison, Dataset, Evaluation, Exchange, Export, File, Job, Prompt, PromptRun, Upload, User, Vote

T = TypeVar("T", bound=File | Dataset | Job | Comparison | Evaluation | Export | Prompt | PromptRun | Vote | Exchange | Upload)


class _Shown(NamedTuple):
    """What people call an object, the prefix of its public id, and the field of a request that names it."""

    name: str
    prefix: str | None
    param: str | None
    hint: str = ""


_SHOWN: dict[type[Any], _Shown] = {
    File: _Shown("file", ids.FILE, "file_id"),
    Dataset: _Shown("dataset", ids.DATASET, "dataset"),
    Job: _Shown("fine-tuning job", ids.JOB, "fine_tuning_job_id"),
    Comparison: _Shown("comparison", ids.COMPARISON, "comparison_id"),
    Evaluation: _Shown("evaluation", ids.EVALUATION, "evaluation_id"),
    Export: _Shown("export", ids.EXPORT, "export_id"),
    Prompt: _Shown("prompt", ids.PROMPT, "prompt_id"),
    PromptRun: _Shown("run", ids.RUN, "run_id"),
    Vote: _Shown("vote", ids.VOTE, "vote_id"),
    Exchange: _Shown("conversation", None, None, "The playground's history lists those that are stored."),
    Upload: _Shown("upload", None, None, "Begin again."),
}


def mine(table: type[T], user: User, *conditions: ColumnElement[bool]) -> Select[T]:
    """The query of a person's objects that are not deleted."""
    deleted_at = getattr(table, "deleted_at", None)  # votes, conversations and uploads are gone when they are deleted
    return select(table).where(table.owner_id == user.id, *([] if deleted_at is None else [deleted_at.is_(None)]), *conditions)


def owned(session: Session, table: type[T], user: User, key: uuid.UUID, *conditions: ColumnElement[bool]) -> T:
    """One's own object as it is in the database now. Raises NotFound, also for another person's."""
    query = mine(table, user, *conditions).where(table.id == key)
    found = session.scalar(query.execution_options(populate_existing=True))
    if found is None:
        name, prefix, param, hint = _SHOWN[table]
        raise NotFound(f"No such {name}: {ids.public(prefix, key) if prefix else key}", param=param, hint=hint)
    return found
