"""A project is deleted: what is in it is moved to another project, or deleted with it, after a look at what that would be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from app import limits, personal_data
from app.errors import Conflict
from app.languages import gettext, ngettext
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
    ModelAlias,
    Project,
    Prompt,
    PromptRun,
    RequestBatch,
    SavedGrader,
    StopVisit,
    TokenUse,
    Vote,
    WebhookEndpoint,
)
from app.web import projects

SHOWN: dict[str, Any] = {
    "files": File, "datasets": Dataset, "jobs": Job, "comparisons": Comparison, "models": Model, "aliases": ModelAlias,
    "evaluations": Evaluation, "exports": Export, "prompts": Prompt, "prompt runs": PromptRun, "graders": SavedGrader, "distillations": DistillationRun,
    "batches": RequestBatch, "conversations": Exchange, "votes": Vote, "webhook endpoints": WebhookEndpoint,
    "evals": Eval, "runs of evals": EvalRun,
    "results of the reading room": StopVisit,
}  # fmt: skip
"""What a preview counts, by what it is called."""
WORDS: dict[str, Callable[[int], str]] = {
    "files": lambda count: ngettext("%(num)s file", "%(num)s files", count),
    "datasets": lambda count: ngettext("%(num)s dataset", "%(num)s datasets", count),
    "jobs": lambda count: ngettext("%(num)s run", "%(num)s runs", count),
    "comparisons": lambda count: ngettext("%(num)s comparison", "%(num)s comparisons", count),
    "models": lambda count: ngettext("%(num)s model", "%(num)s models", count),
    "aliases": lambda count: ngettext("%(num)s alias", "%(num)s aliases", count),
    "evaluations": lambda count: ngettext("%(num)s evaluation", "%(num)s evaluations", count),
    "exports": lambda count: ngettext("%(num)s export", "%(num)s exports", count),
    "prompts": lambda count: ngettext("%(num)s prompt", "%(num)s prompts", count),
    "prompt runs": lambda count: ngettext("%(num)s prompt run", "%(num)s prompt runs", count),
    "graders": lambda count: ngettext("%(num)s grader", "%(num)s graders", count),
    "distillations": lambda count: ngettext("%(num)s distillation", "%(num)s distillations", count),
    "batches": lambda count: ngettext("%(num)s batch", "%(num)s batches", count),
    "conversations": lambda count: ngettext("%(num)s conversation", "%(num)s conversations", count),
    "votes": lambda count: ngettext("%(num)s vote", "%(num)s votes", count),
    "webhook endpoints": lambda count: ngettext("%(num)s webhook endpoint", "%(num)s webhook endpoints", count),
    "evals": lambda count: ngettext("%(num)s eval", "%(num)s evals", count),
    "runs of evals": lambda count: ngettext("%(num)s run of an eval", "%(num)s runs of evals", count),
    "results of the reading room": lambda count: ngettext(
        "%(num)s result of the reading room", "%(num)s results of the reading room", count
    ),
}
"""So many of each of them, in words."""


class Contents(NamedTuple):
    """What is in a project."""

    counts: dict[str, int]
    bytes: int

    def __bool__(self) -> bool:
        return any(self.counts.values())

    def in_words(self) -> str:
        return ", ".join(WORDS[name](count) for name, count in self.counts.items() if count)


def contents(session: Session, project: Project) -> Contents:
    """What is in it and was not deleted before."""
    counts = {}
    for name, table in SHOWN.items():
        query = select(func.count()).select_from(table).where(table.project_id == project.id)
        deleted_at = getattr(table, "deleted_at", None)
        counts[name] = session.scalar(query if deleted_at is None else query.where(deleted_at.is_(None))) or 0
    return Contents(counts, int(limits.used_by(session, "project", project.id, "storage_bytes")))


def remove(session: Session, project: Project, *, move_to: Project | None = None, with_contents: bool = False) -> Contents:
    """Delete a project; returns what was in it. Its keys, links and members go with it.

    Raises Conflict for a person's own project, for one with something in it of which is not said what becomes of it, where names are
    taken in the other project, and while something that would be deleted is being worked on or is used elsewhere.
    """
    if project.personal:
        message = gettext("%(project)s is a person's own project.", project=project.name)
        raise Conflict(message, hint=gettext("It goes with the person."), code="personal_project")
    if move_to is not None and move_to.id == project.id:
        raise Conflict(gettext("A project cannot be moved into itself."), hint=gettext("Name another project."), param="move_to")
    found = contents(session, project)
    if found and move_to is None and not with_contents:
        raise Conflict(
            gettext("%(project)s is not empty: %(contents)s.", project=project.name, contents=found.in_words()),
            hint=gettext("Say where that goes (move_to), or that it is deleted too (contents=delete)."),
            code="project_not_empty",
        )
    if move_to is not None:
        _move(session, project, move_to)
    _keep_use(session, project)
    session.flush()
    personal_data.remove_project(session, project)
    return found


def _move(session: Session, project: Project, to: Project) -> None:
    """Everything in it becomes the other project's. What was deleted before moves too: something else may refer to it."""
    _refuse_taken_names(session, project, to)
    for table in projects.owned_tables():
        values: dict[str, Any] = {"project_id": to.id}
        if table in (Job, Comparison):
            values["idempotency_key"] = None  # it is the project's, and the other one may have the same
        session.execute(update(table).where(table.project_id == project.id).values(**values))


def _refuse_taken_names(session: Session, project: Project, to: Project) -> None:
    taken: list[str] = []
    for table in (Model, ModelAlias):
        live = [] if table is ModelAlias else [Model.deleted_at.is_(None)]
        there = select(table.name).where(table.project_id == to.id, *live)
        taken += session.scalars(select(table.name).where(table.project_id == project.id, table.name.in_(there), *live))
    if taken:
        names = ", ".join(sorted(taken)[:5])
        message = gettext("%(project)s has models or aliases with the same names: %(names)s.", project=to.name, names=names)
        raise Conflict(message, hint=gettext("Rename or delete them first."))


def _keep_use(session: Session, project: Project) -> None:
    """The tokens that people used in it count for them in their own projects, so that no limit is escaped by this."""
    for row in session.scalars(select(TokenUse).where(TokenUse.project_id == project.id)).all():
        if session.get(Project, row.user_id) is not None and row.user_id != project.id:
            limits.count_tokens(session, row.user_id, row.user_id, read=row.read, written=row.written, encoded=row.encoded, day=row.day)
    session.execute(delete(TokenUse).where(TokenUse.project_id == project.id))
