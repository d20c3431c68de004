"""Conflicting rows: the same input with different labels, answers or preferences.

The report names the later rows, each with the first of its group; a person decides which row is right. Every choice is a new
version in which exactly that is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import BigInteger, func, select
from sqlalchemy.dialects.postgresql import aggregate_order_by
from sqlalchemy.orm import Session

from app.datasets import inspections, issue_names, versions
from app.errors import BadField, NotFound
from app.languages import gettext
from app.tables import Dataset, Finding, Inspection, User

PER_PAGE = 10
MAX_OF_A_GROUP = 20
"""Rows of one group that are shown; the rest is shown once these are decided."""


class ConflictGroup(NamedTuple):
    """Rows with one input: the rule they violate, and their lines in the order of the file."""

    rule: str
    lines: list[int]


_FIRST = Finding.fix["arguments"]["line"].astext.cast(BigInteger)


def groups(session: Session, dataset: Dataset, page: int = 1, line: int | None = None) -> tuple[list[ConflictGroup], bool]:
    """One page of groups, or the one that contains `line`; and whether there are more."""
    found = (
        select(Finding.rule, _FIRST, func.array_agg(aggregate_order_by(Finding.line, Finding.line)))
        .where(
            Finding.dataset_id == dataset.id, Finding.rule.in_(issue_names.CONFLICTS), Finding.fix["operation"].astext == issue_names.CHOOSE
        )
        .group_by(Finding.rule, _FIRST)
        .order_by(_FIRST)
    )
    if line is not None:
        found = found.having((line == _FIRST) | func.bool_or(Finding.line == line))
    rows = session.execute(found.offset((page - 1) * PER_PAGE).limit(PER_PAGE + 1)).all()
    return [ConflictGroup(rule, [first, *lines][:MAX_OF_A_GROUP]) for rule, first, lines in rows[:PER_PAGE]], len(rows) > PER_PAGE


def ask(session: Session, dataset: Dataset, shown: Sequence[ConflictGroup]) -> Inspection:
    """Request the rows of these groups from the data worker."""
    lines = [line for group in shown for line in group.lines]
    return inspections.ask(session, dataset, "rows", {"count": len(lines), "cutoff": 0, "lines": lines})


def resolve(session: Session, user: User, dataset: Dataset, first: int, do: str, label: str = "") -> Dataset:
    """A version in which the group that begins at line `first` is decided: `do` is keep:LINE, remove or relabel."""
    found, _ = groups(session, dataset, line=first)
    group = next((group for group in found if group.lines[0] == first), None)
    if group is None:
        message = gettext(
            "Version %(version)s of %(name)s has no conflict that begins at line %(line)s.",
            version=dataset.version,
            name=dataset.name,
            line=first,
        )
        raise NotFound(message, hint=gettext("Load the list of conflicts again."), param="first")
    if do == "relabel":
        return versions.relabel(session, user, dataset, group.lines, label)
    if do == "remove":
        return versions.drop_rows(session, user, dataset, group.lines)
    kept = do.removeprefix("keep:")
    if not do.startswith("keep:") or kept not in map(str, group.lines):
        said = gettext("A conflict is resolved by keeping one of its rows.")
        raise BadField(said, hint=gettext("Press one of its buttons."), param="do")
    return versions.keep_row(session, user, dataset, int(kept), [line for line in group.lines if line != int(kept)])
