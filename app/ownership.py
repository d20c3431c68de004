"""Who sees what: the objects of the project that a person works in. Another project's object, and one that was deleted, is as if it
were not there. Who may change what is in it is decided by `may_change`, which `app.web.policy` asks once for each request."""

from __future__ import annotations

import uuid
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import ColumnElement, CompoundSelect, Select, select, union
from sqlalchemy.orm import Session

from app.errors import NotFound
from app.kit import ids
from app.languages import gettext, mark
from app.tables import (
    Comparison,
    Dataset,
    DistillationRun,
    Eval,
    EvalRun,
    Evaluation,
    Exchange,
    Export,
    File,
    Job,
    Model,
    Project,
    ProjectMember,
    Prompt,
    PromptRun,
    RequestBatch,
    SavedGrader,
    StopVisit,
    Upload,
    User,
    Vote,
    WebhookEndpoint,
)

T = TypeVar(
    "T",
    bound=RequestBatch
    | File
    | Dataset
    | Model
    | Job
    | Comparison
    | Evaluation
    | Export
    | Prompt
    | PromptRun
    | DistillationRun
    | SavedGrader
    | Vote
    | Exchange
    | Upload
    | WebhookEndpoint
    | Eval
    | EvalRun
    | StopVisit,
)


class _Shown(NamedTuple):
    """What is said where an object is not there, the prefix of its public id, and the field of a request that names it."""

    message: str
    prefix: str | None
    param: str | None
    hint: str = ""


_SHOWN: dict[type[Any], _Shown] = {
    Eval: _Shown(mark("No such eval: %(id)s"), ids.EVAL, "eval_id"),
    EvalRun: _Shown(mark("No such run of an eval: %(id)s"), ids.EVAL_RUN, "run_id"),
    WebhookEndpoint: _Shown(mark("No such webhook endpoint: %(id)s"), ids.WEBHOOK, "webhook_endpoint_id"),
    RequestBatch: _Shown(mark("No such batch: %(id)s"), ids.BATCH, "batch_id"),
    File: _Shown(mark("No such file: %(id)s"), ids.FILE, "file_id"),
    Dataset: _Shown(mark("No such dataset: %(id)s"), ids.DATASET, "dataset"),
    Job: _Shown(mark("No such fine-tuning job: %(id)s"), ids.JOB, "fine_tuning_job_id"),
    Comparison: _Shown(mark("No such comparison: %(id)s"), ids.COMPARISON, "comparison_id"),
    Evaluation: _Shown(mark("No such evaluation: %(id)s"), ids.EVALUATION, "evaluation_id"),
    Export: _Shown(mark("No such export: %(id)s"), ids.EXPORT, "export_id"),
    Prompt: _Shown(mark("No such prompt: %(id)s"), ids.PROMPT, "prompt_id"),
    PromptRun: _Shown(mark("No such run: %(id)s"), ids.RUN, "run_id"),
    DistillationRun: _Shown(mark("No such distillation: %(id)s"), ids.DISTILLATION, "distillation_id"),
    SavedGrader: _Shown(mark("No such grader: %(id)s"), ids.GRADER, "grader_id"),
    Vote: _Shown(mark("No such vote: %(id)s"), ids.VOTE, "vote_id"),
    Exchange: _Shown(mark("No such conversation: %(id)s"), None, None, mark("The playground's history lists those that are stored.")),
    StopVisit: _Shown(mark("No such result of the reading room: %(id)s"), None, "visit", mark("The page of the stop lists yours.")),
    Upload: _Shown(mark("No such upload: %(id)s"), None, None, mark("Begin again.")),
}


def mine(table: type[T], user: User, *conditions: ColumnElement[bool]) -> Select[T]:
    """The query of the objects of a person's project that are not deleted."""
    deleted_at = getattr(table, "deleted_at", None)  # votes, conversations and uploads are gone when they are deleted
    return select(table).where(table.project_id == user.project_id, *([] if deleted_at is None else [deleted_at.is_(None)]), *conditions)


MADE = "luthier_made"
"""Where a session has the rows that statements made, for the audit log: it sees only those that were added as objects."""


def made(session: Session, row: T) -> T:
    """This row, which a statement of this transaction made."""
    session.info.setdefault(MADE, []).append(row)
    return row


def either(*queries: Select[Any]) -> CompoundSelect[Any]:
    """The ids that any of these queries of ids finds, each by an index of its own: under one OR every row would be read."""
    return union(*(select(query.subquery().c.id) for query in queries))


def owned(session: Session, table: type[T], user: User, key: uuid.UUID, *conditions: ColumnElement[bool]) -> T:
    """An object of the person's project as it is in the database now. Raises NotFound, also for another project's."""
    query = mine(table, user, *conditions).where(table.id == key)
    found = session.scalar(query.execution_options(populate_existing=True))
    if found is None:
        message, prefix, param, hint = _SHOWN[table]
        hint = _elsewhere(session, table, user, key) or gettext(hint)
        raise NotFound(gettext(message, id=ids.public(prefix, key) if prefix else key), param=param, hint=hint)
    return found


def _elsewhere(session: Session, table: type[Any], user: User, key: uuid.UUID) -> str:
    """What to do where the object is in another project of the same person; empty where it is not."""
    query = select(Project.name).join(ProjectMember, ProjectMember.project_id == Project.id).join(table, table.project_id == Project.id)
    deleted_at = getattr(table, "deleted_at", None)
    query = query if deleted_at is None else query.where(deleted_at.is_(None))
    name = session.scalar(query.where(table.id == key, ProjectMember.user_id == user.id, Project.id != user.project_id))
    return gettext("It is in your project %(project)s: choose that one first.", project=name) if name else ""


def maker_of(session: Session, row: Any) -> User:
    """The person who made a row, working in its project: for what is done for them without a request.

    It is a copy of the account, so that nothing else in this transaction works in that project.
    """
    found = session.get_one(User, row.owner_id)
    return User(id=found.id, name=found.name, role=found.role).work_in(row.project_id)


def may_change(project_role: str) -> bool:
    """Whether somebody with this role in a project changes what is in it."""
    return project_role in ("admin", "member")
