"""The data of a dataset's page: its report, its issues one page at a time, its versions."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from sqlalchemy.orm import Session

from app import formats
from app.datasets import changes, ingest_task, inspections, issue_names, row_editor, versions
from app.datasets import service as datasets
from app.datasets.ingest import MAPPED_COLUMNS
from app.errors import StudioError
from app.formats._messages import CHOICES
from app.jobs import row_losses
from app.kit import ids
from app.kit.humanize import human_number, human_seconds
from app.languages import gettext, ngettext
from app.run_settings import RunSettings
from app.tables import Dataset

FINDINGS_PER_PAGE = 50
SAMPLES_OF_PREVIEW = 5
MAX_LINES = 5
WAIT_SECONDS = 2.5


@dataclass(slots=True)
class Chosen:
    """The page's URL parameters: the tab, and which issues are listed."""

    tab: str = "report"
    rule: str = ""
    severity: str = ""
    sort: str = "line"
    page: int = 1


def context(
    session: Session, dataset: Dataset, chosen: Chosen, problem: StudioError | None = None, ticked: Iterable[int] = ()
) -> dict[str, Any]:
    """The values of `dataset.html`; `problem` is why a fix was refused, and `ticked` the findings that stay selected."""
    found, more = datasets.findings(
        session, dataset, chosen.rule or None, chosen.severity or None, chosen.sort,
        (chosen.page - 1) * FINDINGS_PER_PAGE, FINDINGS_PER_PAGE,
    )  # fmt: skip
    report, rules = dataset.report or {}, datasets.rules(dataset)
    before = row_losses.job_before(session, dataset) if dataset.status == "ready" else None
    return {
        "dataset": dataset,
        "key": ids.public(ids.DATASET, dataset.id),
        "tab": chosen.tab,
        "problem": problem,
        "health": health(dataset),
        "longer": longer(dataset) if chosen.rule in issue_names.LENGTHS else None,
        "changed": None,
        "changes_of": changes.same_file,
        "parts_of": row_editor.parts,
        "before": before and (before[0].name, ids.public(ids.JOB, before[0].id), before[1].version),
        "with_ledger": bool(row_losses.jobs_of(session, dataset)),
        "entry": formats.FORMATS.get(dataset.format or ""),
        "formats": list(formats.FORMATS.values()),
        "stats": datasets.stats(dataset),
        "report": report,
        "so_far": so_far(dataset),
        "to_map": _to_map(dataset),
        "unknown_roles": datasets.unknown_roles(dataset),
        "roles": CHOICES,
        "preview": report.get("preview", [])[:SAMPLES_OF_PREVIEW],
        "rules": rules,
        "findings": found,
        "why_unfixed": versions.why_unfixed,
        "conflicts": issue_names.CONFLICTS,
        "ticked": set(ticked),
        "origin_words": versions.describe,
        "again": ingest_task.can_be_read_again(dataset),
        "fixable": any(not versions.why_unfixed(one) for one in found),
        "more": more,
        "page": chosen.page,
        "chosen": {name: value for name, value in asdict(chosen).items() if name != "tab"},
        "versions": [(version, ids.public(ids.DATASET, version.id)) for version in datasets.versions(session, dataset)],
        "file_key": ids.public(ids.FILE, dataset.file_id) if dataset.file_id else None,
        "lengths": _bars(report.get("token_lengths") or report.get("lengths", [])),
    }


def _to_map(dataset: Dataset) -> dict[str, Any]:
    """The data of the panel that maps columns: the file's own, and for each format the current or suggested mapping."""
    failed = dataset.status == "error"
    found = (dataset.error if failed else dataset.report) or {}
    columns = (found.get("columns") or [])[:MAPPED_COLUMNS]
    mappings = found.get("mappings") or {name: entry.guess_mapping(columns) for name, entry in formats.FORMATS.items()}
    if dataset.format:
        chosen = {field: column for field, column in dataset.mapping.items() if column in columns}
        mappings = mappings | {dataset.format: (mappings.get(dataset.format, {}) | chosen) if failed else chosen}
    return {
        "columns": columns,
        "preview": found.get("preview" if failed else "first") or [],
        "format": dataset.format or (found.get("suggested") or {}).get("format"),
        "mappings": {name: mappings.get(name, {}) for name in formats.FORMATS},
    }


def changed(session: Session, dataset: Dataset) -> dict[str, Any] | None:
    """The page's data about its changes, without the answer: `with_answer` waits for that while no connection is held."""
    asked = changes.ask(session, dataset)
    if asked is None:
        return None
    kinds = {kind: gettext(words) for kind, words in changes.KINDS.items()}
    return {"parent": changes.parent_of(session, dataset), "asked": asked.id, "kinds": kinds, "shown": changes.EXAMPLES}


def with_answer(found: dict[str, Any]) -> dict[str, Any]:
    answer = inspections.wait(found["asked"], WAIT_SECONDS)
    return found | {"result": answer.result, "error": answer.error, "words": changes.words(answer.result) if answer.result else ""}


class HealthLine(NamedTuple):
    """One line of a dataset's health: severity, text, and link."""

    severity: str
    text: str
    path: str = ""
    link: str = ""


def health(dataset: Dataset) -> list[HealthLine]:
    """At most MAX_LINES lines: the usable rows, and the most serious issues."""
    if dataset.status != "ready":
        return []
    rows, good = dataset.rows or 0, dataset.good_rows or 0
    path = f"/datasets/{ids.public(ids.DATASET, dataset.id)}"
    worst = "ready" if good == rows else "warning" if good else "error"
    why = (f"{path}?tab=issues&severity=error", gettext("See why")) if good < rows else ()
    usable = ngettext("%(good)s of %(num)s row usable", "%(good)s of %(num)s rows usable", rows, good=human_number(good))
    lines = [HealthLine(worst, usable, *why)]
    if cut := longer(dataset):
        lines.append(cut)
    for rule in datasets.rules(dataset):
        if rule["rule"] == "over_long":
            continue
        issue = gettext(issue_names.title(rule["rule"]))
        counted = ngettext("%(num)s row: %(issue)s", "%(num)s rows: %(issue)s", rule["count"], issue=issue)
        text = rule["message"] if rule["rule"] in issue_names.WHOLE else counted
        if rule["rule"] in issue_names.CONFLICTS:
            lines.append(HealthLine(rule["severity"], text, f"{path}/conflicts", gettext("Resolve")))
        else:
            lines.append(HealthLine(rule["severity"], text, f"{path}?tab=issues&rule={rule['rule']}", gettext("See rows")))
    return lines[:MAX_LINES]


def longer(dataset: Dataset) -> HealthLine | None:
    """Rows that the default max sequence length truncates, and the smallest length that spares nearly all of them. None is
    offered where the context window of the counting model truncates them."""
    report, rows = dataset.report or {}, dataset.good_rows or 0
    cut, usual = dict(report.get("rows_cut", [])), report.get("cutoff")
    key = ids.public(ids.DATASET, dataset.id)
    if usual is None or not cut.get(usual):
        return None
    text = ngettext(
        "%(num)s row longer than %(limit)s tokens: truncated",
        "%(num)s rows longer than %(limit)s tokens: truncated",
        cut[usual],
        limit=human_number(usual),
    )
    others = [cutoff for cutoff in cut if cutoff > usual and cut[cutoff] < cut[usual]]
    if usual < RunSettings().max_length or not others:
        return HealthLine("note", text, f"/datasets/{key}/rows?sort=longest#rows", gettext("See rows"))
    better = next((cutoff for cutoff in others if cut[cutoff] <= 0.05 * rows), others[-1])
    kept = math.floor(100 * (rows - cut[better]) / rows)
    return HealthLine(
        "note",
        text,
        f"/jobs/new?dataset={key}&run.max_length={better}",
        gettext("Raise max length to %(length)s (keeps %(kept)s%% whole)", length=human_number(better), kept=kept),
    )


def _bars(lengths: list[list[int]]) -> list[dict[str, Any]]:
    """The length histogram with each bar's height relative to the tallest, 0 to 1."""
    most = max((count for _, count in lengths), default=1)
    return [{"low": low, "high": max(2 * low - 1, low), "count": count, "share": count / most} for low, count in lengths]


def so_far(dataset: Dataset) -> str:
    """Rows read and time left, in words; empty before any is known."""
    found = (dataset.report or {}).get("so_far") or {}
    if not found:
        return ""
    rows, left = found["rows"], found.get("seconds_left")
    if left is None:
        return ngettext("%(num)s rows so far.", "%(num)s rows so far.", rows)
    time = human_seconds(max(1, left))
    return ngettext("%(num)s rows so far, about %(time)s left.", "%(num)s rows so far, about %(time)s left.", rows, time=time)
