"""Differences between a version and its parent. Lines keep their numbers through every version of a file, so both are merged in
one pass, in bounded memory."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from app.datasets import inspections
from app.datasets.row_store import read_rows
from app.kit.humanize import human_number
from app.kit.json_safe import shortened
from app.languages import gettext, mark, ngettext
from app.tables import Dataset, Inspection

KINDS = {"removed": mark("removed"), "relabeled": mark("relabeled"), "edited": mark("edited"), "added": mark("now valid")}
"""Each kind of change, and its label."""
EXAMPLES, EXAMPLE_BYTES = 5, 4 << 10


def parent_of(session: Session, dataset: Dataset) -> Dataset | None:
    """The version it was made from, where its rows still exist and come from the same file."""
    parent = session.get(Dataset, dataset.parent_id) if same_file(dataset) else None
    return parent if parent is not None and parent.status == "ready" and parent.rows_path and parent.deleted_at is None else None


def same_file(dataset: Dataset) -> bool:
    """Whether it is a version by edits or by parsing again; a combined dataset has lines of its own."""
    return dataset.parent_id is not None and not (dataset.origin or {}).get("sources")


def ask(session: Session, dataset: Dataset) -> Inspection | None:
    """The comparison with its parent; None where there is nothing to compare with."""
    parent = parent_of(session, dataset)
    if parent is None or dataset.status != "ready":
        return None
    return inspections.ask(session, dataset, "changes", {"before_rows": parent.rows_path})


def words(result: dict[str, Any]) -> str:
    """`2 rows removed, 1 edited`."""
    found = [(kind, result[kind]) for kind in KINDS if result[kind]]
    if not found:
        return gettext("No row changed")
    (kind, count), *others = found
    return ", ".join([_first(kind, count), *(_further(kind, count) for kind, count in others)])


def _first(kind: str, count: int) -> str:
    return {
        "removed": lambda: ngettext("%(num)s row removed", "%(num)s rows removed", count),
        "relabeled": lambda: ngettext("%(num)s row relabeled", "%(num)s rows relabeled", count),
        "edited": lambda: ngettext("%(num)s row edited", "%(num)s rows edited", count),
        "added": lambda: ngettext("%(num)s row now valid", "%(num)s rows now valid", count),
    }[kind]()


def _further(kind: str, count: int) -> str:
    """The same behind another kind, so without the word row."""
    said = {
        "removed": gettext("%(count)s removed", count=human_number(count)),
        "relabeled": gettext("%(count)s relabeled", count=human_number(count)),
        "edited": gettext("%(count)s edited", count=human_number(count)),
        "added": gettext("%(count)s now valid", count=human_number(count)),
    }
    return said[kind]


# In a child of the data worker ----------------------------------------------------------------------------------------


def look(payload: dict[str, Any], say: Any) -> dict[str, Any]:
    """`payload`: rows and before, the files of both versions. Counts every kind of change, and shows the first of each."""
    counts: Counter[str] = Counter()
    examples: list[dict[str, Any]] = []
    for line, before, after in _side_by_side(Path(payload["before"]), Path(payload["rows"])):
        kind = "kept" if before == after else _kind(before, after)
        counts[kind] += 1
        if kind != "kept" and counts[kind] <= EXAMPLES:
            examples.append({"line": line, "kind": kind, "before": _shown(before), "after": _shown(after)})
    return {kind: counts[kind] for kind in (*KINDS, "kept")} | {"examples": examples}


def _side_by_side(before: Path, after: Path) -> Iterator[tuple[int, str | None, str | None]]:
    """(line, row before, row after) in the order of the lines, None where a version has no such row."""
    left, right = read_rows(before), read_rows(after)
    one, other = next(left, None), next(right, None)
    while one or other:
        line = min(found[0] for found in (one, other) if found)
        ours, theirs = (found[1] if found and found[0] == line else None for found in (one, other))
        yield line, ours, theirs
        one, other = (next(left, None) if ours is not None else one), (next(right, None) if theirs is not None else other)


def _kind(before: str | None, after: str | None) -> str:
    if before is None or after is None:
        return "added" if before is None else "removed"
    one, other = json.loads(before), json.loads(after)
    return "relabeled" if "label" in one and {**one, "label": other.get("label")} == other else "edited"


def _shown(row: str | None) -> dict[str, Any] | None:
    return None if row is None else shortened(json.loads(row), EXAMPLE_BYTES)[0]
