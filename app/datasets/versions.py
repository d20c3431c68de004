"""New versions of a dataset: fixed, edited, with rows removed. The parent is not changed; the new version is its file parsed
again with a longer list of edits (`app/datasets/edits.py`)."""

from __future__ import annotations

import functools
import json
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app import formats, objectives
from app.datasets import edits, issue_names
from app.datasets import service as datasets
from app.datasets.ingest_task import lines_path
from app.datasets.readers import parse_json
from app.errors import BadField, Conflict
from app.formats._messages import CHOICES
from app.kit import ids
from app.kit.humanize import human_number
from app.kit.json_safe import DEEPEST, too_deep
from app.languages import english, gettext, localized, ngettext
from app.storage import places
from app.tables import Dataset, Finding, User

_OF_THE_REPORT = {"drop_row", *edits.TEXT_EDITS}
"""Operations that need only the line; all others are the format's own and are determined again from the row."""
_OF_THE_READER = {"repair"}
"""Operations on a line before there is a row."""

MAX_LINES = 1_000_000
MAX_LABEL_LENGTH = 200
MAX_FINDINGS = 1000
"""Findings fixed by id at once; all of a rule are fixed by the rule."""
MAX_TOLD = 50
"""Issues without a fix that a version stores to list."""


class Fixed(NamedTuple):
    """A new version, the number of rows fixed in it, and the chosen issues that have no automatic fix."""

    dataset: Dataset
    rows: int
    unfixed: list[Finding]


def why_unfixed(found: Finding) -> str | None:
    """Why an issue has no automatic fix; None where it has one."""
    if not found.line:
        return gettext("It is about the whole dataset, not one row.")
    if found.fix is None:
        return gettext("No automatic fix. Edit or remove the row.")
    if found.fix["operation"] == issue_names.CHOOSE:
        return gettext("Two rows contradict each other: choose which one is right.")
    return None


def fix_some(session: Session, user: User, dataset: Dataset, finding_ids: Sequence[int]) -> Fixed:
    """A version with the fixes of these findings that have one. Raises BadField when none has."""
    wanted = sorted(set(finding_ids))
    if len(wanted) > MAX_FINDINGS:
        said = gettext("At most %(most)s issues are fixed at once.", most=human_number(MAX_FINDINGS))
        raise BadField(said, hint=gettext("Fix all of one rule instead."), param="finding")
    query = select(Finding).where(Finding.dataset_id == dataset.id, Finding.id.in_(wanted)).order_by(Finding.id)
    found = session.scalars(query).all()
    if gone := set(wanted) - {one.id for one in found}:
        said = gettext("Version %(version)s has no issue %(issue)s.", version=dataset.version, issue=min(gone))
        raise BadField(said, hint=gettext("Load the page again."), param="finding")
    fixed, unfixed = [one for one in found if not why_unfixed(one)], [one for one in found if why_unfixed(one)]
    if not fixed:
        said = gettext("None of the selected issues has an automatic fix.")
        raise BadField(said, hint=gettext("Edit or remove their rows."), param="finding")
    rules = " and ".join(dict.fromkeys(one.rule for one in fixed))
    merges, others = [one for one in fixed if _merges(one)], [one for one in fixed if not _merges(one)]
    lines = sorted({one.line for one in others if one.line})
    rows = len(lines) + sum(_merged_rows(dataset, one) for one in merges)
    origin = {"operation": "fix", "rule": rules, **({"count": rows} if merges else _named(lines)), **_told_unfixed(unfixed)}
    made = [_edit(one, [one.line]) for one in fixed if one.line]
    return Fixed(make(session, user, dataset, made, origin), rows, unfixed)


def fix_all(session: Session, user: User, dataset: Dataset, rule: str) -> Fixed:
    """A version with the fix of every finding of a rule, including unlisted ones. Raises BadField when it has none."""
    query = select(Finding).where(Finding.dataset_id == dataset.id, Finding.rule == rule).order_by(Finding.id)
    found = session.scalars(query.where(Finding.fix.is_not(None)).limit(1)).first()
    lines = lines_of(session, dataset, rule) if found is not None and not why_unfixed(found) else []
    if found is None or not lines:
        title = issue_names.title(rule[:60])
        if rule in issue_names.CONFLICTS:
            said = gettext(
                "No automatic fix for “%(issue)s”: its rows contradict each other, and which one is right is your choice.", issue=title
            )
        else:
            said = gettext("No automatic fix for “%(issue)s”: it has none.", issue=title)
        raise BadField(said, hint=gettext("Edit or remove the rows."), param="rule")
    if _merges(found):
        return fix_some(session, user, dataset, [one.id for one in session.scalars(query.limit(MAX_FINDINGS))])
    unfixed = list(session.scalars(query.where(Finding.fix.is_(None)).limit(MAX_FINDINGS)))
    origin = {"operation": "fix", "rule": rule, "count": len(lines), **_told_unfixed(unfixed)}
    return Fixed(make(session, user, dataset, [_edit(found, lines)], origin), len(lines), unfixed)


def _merges(found: Finding) -> bool:
    """Whether its fix changes a label in every row that has it."""
    return found.fix is not None and found.fix["operation"] == "merge_labels"


def _merged_rows(dataset: Dataset, found: Finding) -> int:
    labels = (dataset.report or {}).get("labels", {})
    return sum(labels.get(label, 0) for label in (found.fix or {})["arguments"]["from"])


def _told_unfixed(unfixed: Sequence[Finding]) -> dict[str, Any]:
    """The first issues that were not fixed, stored with the version so that its page can list them."""
    with english():
        told = [{"line": one.line, "rule": one.rule, "message": one.message, "why": why_unfixed(one)} for one in unfixed[:MAX_TOLD]]
    return {"unfixed": told, "unfixed_count": len(unfixed)} if unfixed else {}


def _edit(found: Finding, lines: Sequence[int]) -> dict[str, Any]:
    assert found.fix is not None
    operation = found.fix["operation"]
    if _merges(found):
        arguments = found.fix["arguments"]
        return {"operation": "relabel", "all": True, "from": arguments["from"], "label": arguments["into"], "lines": []}
    # Where one rule has several fixes, as roles do, each row gets its own.
    own = operation not in _OF_THE_READER and (operation not in _OF_THE_REPORT or found.severity == "error")
    return {"operation": "mend" if own else operation, "rule": found.rule, "lines": list(lines)}


def lines_of(session: Session, dataset: Dataset, rule: str) -> list[int]:
    """Every line in which a rule with a fix found something."""
    path = places.path(lines_path(Path(dataset.rows_path or "none")).as_posix())
    try:
        kept: list[int] | None = json.loads(path.read_text()).get(rule)
    except FileNotFoundError:
        kept = None
    if kept is None:  # found by another child, which lists its findings only
        query = select(Finding.line).where(Finding.dataset_id == dataset.id, Finding.rule == rule, Finding.fix.is_not(None))
        kept = sorted({line for line in session.scalars(query) if line is not None})
    return kept


def repair(session: Session, user: User, dataset: Dataset) -> Dataset:
    """A version of a file that could not be parsed at all, with its lines read as they were probably meant. Raises Conflict for others."""
    if dataset.status != "error" or not (dataset.error or {}).get("repair"):
        said = gettext("The dataset %(name)s is %(status)s; there is nothing to repair.", name=dataset.name, status=gettext(dataset.status))
        raise Conflict(said, hint=gettext("Look at its issues."))
    new = Dataset(
        id=uuid.uuid4(),
        owner_id=user.id,
        project_id=user.project_id,
        file_id=dataset.file_id,
        parent_id=dataset.id,
        name=dataset.name,
        version=next_number(session, dataset),
        mapping={},
        edits=[*(dataset.edits or []), {"operation": "repair", "all": True, "lines": []}],
        origin={"operation": "repair", "from": ids.public(ids.DATASET, dataset.id)},
    )
    return datasets.order(session, new, datasets.file_of(session, dataset))


def change_roles(session: Session, user: User, dataset: Dataset, roles: dict[str, str]) -> Dataset:
    """A version in which messages of unknown roles get a role, in every row. Raises BadField for an unknown role on either side."""
    unknown = [entry["role"] for entry in datasets.unknown_roles(dataset)]
    for name, role in roles.items():
        if name not in unknown or role not in CHOICES:
            raise BadField(
                gettext("“%(name)s” cannot become “%(role)s”.", name=name[:40], role=role[:40]),
                hint=gettext(
                    "Unknown roles here: %(unknown)s. Each can become %(roles)s.",
                    unknown=", ".join(unknown) or gettext("none"),
                    roles=", ".join(CHOICES),
                ),
                param="roles",
            )
    if not roles:
        hint = gettext("Choose one of %(roles)s for at least one name.", roles=", ".join(CHOICES))
        raise BadField(gettext("No role was chosen."), hint=hint, param="roles")
    return make(session, user, dataset, [{"operation": "roles", "lines": [], "roles": roles}], {"operation": "roles", "roles": roles})


def drop_rows(session: Session, user: User, dataset: Dataset, lines: Sequence[int]) -> Dataset:
    """A version without these lines."""
    if not lines or len(lines) > MAX_LINES:
        raise BadField(gettext("No row was chosen."), hint=gettext("Choose at least one row."), param="lines")
    kept = sorted(set(lines))
    return make(session, user, dataset, [{"operation": "drop_row", "lines": kept}], {"operation": "drop", **_named(kept)})


def keep_row(session: Session, user: User, dataset: Dataset, line: int, others: Sequence[int]) -> Dataset:
    """A version without the rows that conflict with the one at `line`."""
    origin = {"operation": "keep", "kept": line, **_named(others)}
    return make(session, user, dataset, [{"operation": "drop_row", "lines": list(others)}], origin)


def drop_found(session: Session, user: User, dataset: Dataset, finding_ids: Sequence[int]) -> Dataset:
    """A version without the lines of these findings."""
    query = select(Finding.line).where(Finding.dataset_id == dataset.id, Finding.id.in_(sorted(set(finding_ids))[:MAX_FINDINGS]))
    return drop_rows(session, user, dataset, [line for line in session.scalars(query) if line])


def relabel(session: Session, user: User, dataset: Dataset, lines: Sequence[int], label: str) -> Dataset:
    """A version in which these lines have this label. Raises BadField for a dataset without labels, and for what is no label."""
    label = label.strip()
    if not objectives.get(dataset.task).classifies:
        said = gettext("The rows of %(name)s have no label.", name=dataset.name)
        raise BadField(said, hint=gettext("Edit the rows instead."), param="label")
    if not label or len(label) > MAX_LABEL_LENGTH or "\0" in label:
        said = gettext("A label has 1 to %(most)s characters.", most=MAX_LABEL_LENGTH)
        raise BadField(said, hint=gettext("Type another one."), param="label")
    if not lines or len(lines) > MAX_LINES:
        raise BadField(gettext("No row was chosen."), hint=gettext("Choose at least one row."), param="lines")
    kept = sorted(set(lines))
    edit = {"operation": "relabel", "lines": kept, "label": label}
    return make(session, user, dataset, [edit], {"operation": "relabel", "label": label, **_named(kept)})


def edit_row(session: Session, user: User, dataset: Dataset, line: int, text: str) -> Dataset:
    """A version in which one row is replaced by JSON of a normalized row that a person typed. Raises BadField saying what is wrong."""
    if not dataset.format:
        raise Conflict(gettext("This dataset is not read yet."), hint=gettext("Wait until it is ready."))
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        said = gettext("The row is not valid JSON: %(error)s.", error=error)
        raise BadField(said, hint=gettext("Fix the text and save again."), param="row") from None
    if too_deep(row):
        said = gettext("The row is nested deeper than %(most)s levels.", most=DEEPEST)
        raise BadField(said, hint=gettext("Flatten it and save again."), param="row")
    for found in edits.check_normalised(row, formats.get(dataset.format).shape):
        if found.severity == "error":
            raise BadField(f"{found.message} ({found.column or 'row'})", hint=gettext("Fix the row and save again."), param="row")
    edit = {"operation": "replace", "lines": [line], "row": row}
    return make(session, user, dataset, [edit], {"operation": "edit", "lines": [line]})


def retype_line(session: Session, user: User, dataset: Dataset, line: int, text: str) -> Dataset:
    """A version in which one line of the file is replaced by JSON, with the file's own columns, that a person typed. Raises
    BadField saying what is wrong."""
    if dataset.status != "ready":
        raise _not_ready(dataset)
    row = parse_json(text)
    if not isinstance(row, dict):
        raise BadField(row.message, hint=gettext("Fix the text and save again."), param="row")
    for found in formats.get(dataset.format or "").check(row, dataset.mapping):
        if found.severity == "error":
            raise BadField(f"{found.message} ({found.column or 'row'})", hint=gettext("Fix the row and save again."), param="row")
    return make(session, user, dataset, [{"operation": "retype", "lines": [line], "row": row}], {"operation": "edit", "lines": [line]})


def _not_ready(dataset: Dataset) -> Conflict:
    said = gettext("The dataset %(name)s is %(status)s.", name=dataset.name, status=gettext(dataset.status))
    return Conflict(said, hint=gettext("Wait until it is ready."))


def make(session: Session, user: User, dataset: Dataset, more: list[dict[str, Any]], origin: dict[str, Any]) -> Dataset:
    """The next version: the parent's edits and some more, with its parsing enqueued."""
    if dataset.status != "ready":
        raise _not_ready(dataset)
    file = datasets.file_of(session, dataset)
    new = Dataset(
        id=uuid.uuid4(),
        owner_id=user.id,
        project_id=user.project_id,
        file_id=dataset.file_id,
        parent_id=dataset.id,
        name=dataset.name,
        version=next_number(session, dataset),
        format=dataset.format,
        format_chosen=True,
        # A field without a column keeps none: an empty name keeps it from being detected again.
        mapping={field.name: "" for field in formats.get(dataset.format or "").fields} | dataset.mapping,
        edits=[*(dataset.edits or []), *more],
        origin={**origin, "from": ids.public(ids.DATASET, dataset.id)},
    )
    return datasets.order(session, new, file)


def next_number(session: Session, dataset: Dataset) -> int:
    """The number after the highest of this dataset's versions. Locks, so that concurrent requests wait for each other."""
    family = datasets.family(session, dataset)
    session.execute(select(func.pg_advisory_xact_lock(min(family).int & ((1 << 63) - 1))))
    return (session.scalar(select(func.max(Dataset.version)).where(Dataset.id.in_(family))) or dataset.version) + 1


def _named(lines: Sequence[int]) -> dict[str, Any]:
    return {"lines": list(lines)} if len(lines) <= 20 else {"count": len(lines)}


def describe(dataset: Dataset) -> str:
    """The origin of a version, in a few words."""
    origin = dataset.origin or {}
    count = origin.get("count") or len(origin.get("lines", ()))
    titles = [issue_names.title(rule) for rule in str(origin.get("rule", "")).split(" and ")]
    rule = functools.reduce(lambda one, other: gettext("%(one)s and %(other)s", one=one, other=other), titles)
    roles = ", ".join(f"{name} → {role}" for name, role in (origin.get("roles") or {}).items())
    hub = ", ".join(str(origin[part]) for part in ("repo", "subset", "split") if origin.get(part))
    return {
        "upload": gettext("Uploaded"),
        "read_as": gettext("Re-mapped"),
        "fix": ngettext("Fixed %(rule)s in %(num)s row", "Fixed %(rule)s in %(num)s rows", count, rule=rule),
        "roles": gettext("Changed roles: %(roles)s", roles=roles),
        "drop": ngettext("Removed %(num)s row", "Removed %(num)s rows", count),
        "relabel": ngettext("Labeled %(num)s row as “%(label)s”", "Labeled %(num)s rows as “%(label)s”", count, label=origin.get("label")),
        "keep": ngettext(
            "Kept line %(line)s, removed %(num)s row that contradicted it",
            "Kept line %(line)s, removed %(num)s rows that contradicted it",
            count,
            line=origin.get("kept"),
        ),
        "edit": gettext("Edited line %(line)s", line=origin.get("lines", ["?"])[0]),
        "concatenate": gettext("Concatenated"),
        "mix": gettext("Mixed (weighted)"),
        "sample": ngettext("Sampled %(num)s row", "Sampled %(num)s rows", origin.get("rows") or 0),
        "deduplicate": gettext("Deduplicated"),
        "convert": gettext("Converted"),
        "repair": gettext("Repaired line by line"),
        "distillation": _distilled(origin),
        "hub": gettext("From Hugging Face: %(name)s", name=hub),
    }.get(str(origin.get("operation")), str(origin.get("operation", "–")))


def _distilled(origin: dict[str, Any]) -> str:
    if origin.get("operation") != "distillation":
        return ""
    said = {"teacher": origin.get("teacher"), "license": origin.get("license"), "kept": human_number(origin.get("kept") or 0)}
    prompts = origin.get("prompts") or 0
    if not origin.get("grader"):
        return ngettext(
            "Answers of %(teacher)s (%(license)s) to %(num)s prompt, %(kept)s of them kept",
            "Answers of %(teacher)s (%(license)s) to %(num)s prompts, %(kept)s of them kept",
            prompts,
            **said,
        )
    return ngettext(
        "Answers of %(teacher)s (%(license)s) to %(num)s prompt, %(kept)s of them kept by %(grader)s from %(threshold)s",
        "Answers of %(teacher)s (%(license)s) to %(num)s prompts, %(kept)s of them kept by %(grader)s from %(threshold)s",
        prompts,
        **said,
        grader=origin["grader"],
        threshold=localized(f"{origin.get('threshold'):g}"),
    )
