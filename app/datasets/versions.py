"""New versions of a dataset: fixed, edited, with rows removed. The parent is not changed; the new version is its file parsed
again with a longer list of edits (`app/datasets/edits.py`)."""

from __future__ import annotations

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
from app.kit.json_safe import DEEPEST, too_deep
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
        return "It is about the whole dataset, not one row."
    if found.fix is None:
        return "No automatic fix. Edit or remove the row."
    return "Two rows contradict each other: choose which one is right." if found.fix["operation"] == issue_names.CHOOSE else None


def fix_some(session: Session, user: User, dataset: Dataset, finding_ids: Sequence[int]) -> Fixed:
    """A version with the fixes of these findings that have one. Raises BadField when none has."""
    wanted = sorted(set(finding_ids))
    if len(wanted) > MAX_FINDINGS:
        raise BadField(f"At most {MAX_FINDINGS:,} issues are fixed at once.", hint="Fix all of one rule instead.", param="finding")
    query = select(Finding).where(Finding.dataset_id == dataset.id, Finding.id.in_(wanted)).order_by(Finding.id)
    found = session.scalars(query).all()
    if gone := set(wanted) - {one.id for one in found}:
        raise BadField(f"Version {dataset.version} has no issue {min(gone)}.", hint="Load the page again.", param="finding")
    fixed, unfixed = [one for one in found if not why_unfixed(one)], [one for one in found if why_unfixed(one)]
    if not fixed:
        raise BadField("None of the selected issues has an automatic fix.", hint="Edit or remove their rows.", param="finding")
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
        why = "its rows contradict each other, and which one is right is your choice" if rule in issue_names.CONFLICTS else "it has none"
        raise BadField(f"No automatic fix for “{issue_names.title(rule[:60])}”: {why}.", hint="Edit or remove the rows.", param="rule")
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
        raise Conflict(f"The dataset {dataset.name} is {dataset.status}; there is nothing to repair.", hint="Look at its issues.")
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
                f"“{name[:40]}” cannot become “{role[:40]}”.",
                hint=f"Unknown roles here: {', '.join(unknown) or 'none'}. Each can become {', '.join(CHOICES)}.",
                param="roles",
            )
    if not roles:
        raise BadField("No role was chosen.", hint=f"Choose one of {', '.join(CHOICES)} for at least one name.", param="roles")
    return make(session, user, dataset, [{"operation": "roles", "lines": [], "roles": roles}], {"operation": "roles", "roles": roles})


def drop_rows(session: Session, user: User, dataset: Dataset, lines: Sequence[int]) -> Dataset:
    """A version without these lines."""
    if not lines or len(lines) > MAX_LINES:
        raise BadField("No row was chosen.", hint="Choose at least one row.", param="lines")
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
        raise BadField(f"The rows of {dataset.name} have no label.", hint="Edit the rows instead.", param="label")
    if not label or len(label) > MAX_LABEL_LENGTH or "\0" in label:
        raise BadField(f"A label has 1 to {MAX_LABEL_LENGTH} characters.", hint="Type another one.", param="label")
    if not lines or len(lines) > MAX_LINES:
        raise BadField("No row was chosen.", hint="Choose at least one row.", param="lines")
    kept = sorted(set(lines))
    edit = {"operation": "relabel", "lines": kept, "label": label}
    return make(session, user, dataset, [edit], {"operation": "relabel", "label": label, **_named(kept)})


def edit_row(session: Session, user: User, dataset: Dataset, line: int, text: str) -> Dataset:
    """A version in which one row is replaced by JSON of a normalized row that a person typed. Raises BadField saying what is wrong."""
    if not dataset.format:
        raise Conflict("This dataset is not read yet.", hint="Wait until it is ready.")
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadField(f"The row is not valid JSON: {error}.", hint="Fix the text and save again.", param="row") from None
    if too_deep(row):
        message = f"The row is nested deeper than {DEEPEST} levels."
        raise BadField(message, hint="Flatten it and save again.", param="row")
    for found in edits.check_normalised(row, formats.get(dataset.format).shape):
        if found.severity == "error":
            raise BadField(f"{found.message} ({found.column or 'row'})", hint="Fix the row and save again.", param="row")
    edit = {"operation": "replace", "lines": [line], "row": row}
    return make(session, user, dataset, [edit], {"operation": "edit", "lines": [line]})


def retype_line(session: Session, user: User, dataset: Dataset, line: int, text: str) -> Dataset:
    """A version in which one line of the file is replaced by JSON, with the file's own columns, that a person typed. Raises
    BadField saying what is wrong."""
    if dataset.status != "ready":
        raise Conflict(f"The dataset {dataset.name} is {dataset.status}.", hint="Wait until it is ready.")
    row = parse_json(text)
    if not isinstance(row, dict):
        raise BadField(row.message, hint="Fix the text and save again.", param="row")
    for found in formats.get(dataset.format or "").check(row, dataset.mapping):
        if found.severity == "error":
            raise BadField(f"{found.message} ({found.column or 'row'})", hint="Fix the row and save again.", param="row")
    return make(session, user, dataset, [{"operation": "retype", "lines": [line], "row": row}], {"operation": "edit", "lines": [line]})


def make(session: Session, user: User, dataset: Dataset, more: list[dict[str, Any]], origin: dict[str, Any]) -> Dataset:
    """The next version: the parent's edits and some more, with its parsing enqueued."""
    if dataset.status != "ready":
        raise Conflict(f"The dataset {dataset.name} is {dataset.status}.", hint="Wait until it is ready.")
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
    rows = f"{count:,} row{'s' if count != 1 else ''}"
    rule = " and ".join(issue_names.title(rule) for rule in str(origin.get("rule", "")).split(" and "))
    return {
        "upload": "Uploaded",
        "read_as": "Re-mapped",
        "fix": f"Fixed {rule} in {rows}",
        "roles": f"Changed roles: {', '.join(f'{name} → {role}' for name, role in (origin.get('roles') or {}).items())}",
        "drop": f"Removed {rows}",
        "relabel": f"Labeled {rows} as “{origin.get('label')}”",
        "keep": f"Kept line {origin.get('kept')}, removed {rows} that contradicted it",
        "edit": f"Edited line {origin.get('lines', ['?'])[0]}",
        "concatenate": "Concatenated",
        "mix": "Mixed (weighted)",
        "sample": f"Sampled {origin.get('rows') or 0:,} rows",
        "deduplicate": "Deduplicated",
        "convert": "Converted",
        "repair": "Repaired line by line",
        "distillation": f"Answers of {origin.get('teacher')} ({origin.get('license')}) to {origin.get('prompts') or 0:,} prompts, "
        f"{origin.get('kept') or 0:,} of them kept"
        + (f" by {origin['grader']} from {origin.get('threshold'):g}" if origin.get("grader") else ""),
        "hub": f"From Hugging Face: {', '.join(str(origin[part]) for part in ('repo', 'subset', 'split') if origin.get(part))}",
    }.get(str(origin.get("operation")), str(origin.get("operation", "–")))
