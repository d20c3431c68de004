"""What the page of a dataset shows: its report, its issues one page at a time, its versions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy.orm import Session

from app import datasets, formats, ids, issues, ledger, versions
from app.errors import StudioError
from app.tables import Dataset
from app.web import human_seconds

FINDINGS_PER_PAGE = 50
SAMPLES_OF_PREVIEW = 8


@dataclass(slots=True)
class Chosen:
    """Which issues are listed, as the page's address says."""

    rule: str = ""
    severity: str = ""
    sort: str = "line"
    page: int = 1


def context(
    session: Session, dataset: Dataset, chosen: Chosen, problem: StudioError | None = None, ticked: Iterable[int] = ()
) -> dict[str, Any]:
    """The values of `dataset.html`; `problem` is why a fix was refused, and what was ticked then stays so."""
    found, more = datasets.findings(
        session, dataset, chosen.rule or None, chosen.severity or None, chosen.sort,
        (chosen.page - 1) * FINDINGS_PER_PAGE, FINDINGS_PER_PAGE,
    )  # fmt: skip
    report, rules = dataset.report or {}, datasets.rules(dataset)
    before = ledger.job_before(session, dataset) if dataset.status == "ready" else None
    return {
        "dataset": dataset,
        "key": ids.public(ids.DATASET, dataset.id),
        "problem": problem,
        "before": before and (before[0].name, ids.public(ids.JOB, before[0].id), before[1].version),
        "with_ledger": bool(ledger.jobs_of(session, dataset)),
        "entry": formats.FORMATS.get(dataset.format or ""),
        "formats": list(formats.FORMATS.values()),
        "stats": datasets.stats(dataset),
        "report": report,
        "so_far": so_far(dataset),
        "columns": report.get("columns", []),
        "preview": report.get("preview", [])[:SAMPLES_OF_PREVIEW],
        "rules": rules,
        "errors": sum(entry["count"] for entry in rules if entry["severity"] == "error"),
        "warnings": sum(entry["count"] for entry in rules if entry["severity"] == "warning"),
        "findings": found,
        "why_unfixed": versions.why_unfixed,
        "conflicts": issues.CONFLICTS,
        "ticked": set(ticked),
        "origin_words": versions.describe,
        "again": datasets.can_be_read_again(dataset),
        "fixable": any(not versions.why_unfixed(one) for one in found),
        "more": more,
        "page": chosen.page,
        "chosen": asdict(chosen),
        "versions": [(version, ids.public(ids.DATASET, version.id)) for version in datasets.versions(session, dataset)],
        "file_key": ids.public(ids.FILE, dataset.file_id) if dataset.file_id else None,
        "lengths": _bars(report.get("token_lengths") or report.get("lengths", [])),
    }


def _bars(lengths: list[list[int]]) -> list[dict[str, Any]]:
    """The length histogram with each bar's share of the tallest, 0 to 1."""
    most = max((count for _, count in lengths), default=1)
    return [{"low": low, "high": max(2 * low - 1, low), "count": count, "share": count / most} for low, count in lengths]


def so_far(dataset: Dataset) -> str:
    """Rows read and time left, in words; empty before any is known."""
    found = (dataset.report or {}).get("so_far") or {}
    if not found:
        return ""
    left = found.get("seconds_left")
    return f"{found['rows']:,} rows so far" + (f", about {human_seconds(max(1, left))} left." if left is not None else ".")
