"""Split leakage: rows that are both in the training and in the validation set of a job.

    request ── ask ──→ waiting ──→ the data worker's answer, shown wherever the request is shown

It takes a pass over the rows, so neither the form nor the job waits for it: both show it once it is there.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

from pydantic import ValidationError
from sqlalchemy import select
from sqlalchemy.orm import Session

from app import languages
from app.datasets import inspections
from app.kit import ids, once
from app.kit.humanize import human_number
from app.languages import gettext, ngettext
from app.spec import JobSpec
from app.tables import JSON, Dataset, Inspection, Job

NAMED = 5


def arguments_of(spec: JobSpec) -> dict[str, Any] | None:
    """Arguments of the inspection of a spec's split; None without validation rows."""
    if spec.validation is not None:
        return {"validation_rows": spec.validation.path}
    if not spec.run.validation_fraction:
        return None
    method, column = (spec.split.method, spec.split.column) if spec.split else ("random", None)
    return {"method": method, "column": column, "fraction": spec.run.validation_fraction, "seed": spec.split_seed}


def ask(session: Session, spec: JobSpec) -> Inspection | None:
    """The comparison of both sides of a spec whose rows are known; None without validation rows."""
    arguments = arguments_of(spec)
    if arguments is None or not spec.dataset.path:
        return None
    return inspections.ask(session, session.get_one(Dataset, spec.dataset.id), "split", arguments)


def leakage_summary(session: Session, spec: JobSpec) -> tuple[JSON, list[str]]:
    """(its part of an estimate, warnings). `status` is none, waiting, ready or error; `rows` are validation rows that are in the
    training set too, of `held_out`; `page` lists them."""
    return once.of(("leakage", languages.current.get(), spec.dataset.id, page_of(spec)), lambda: _leakage_summary(session, spec))


def _leakage_summary(session: Session, spec: JobSpec) -> tuple[JSON, list[str]]:
    found = ask(session, spec)
    if found is None:
        return {"status": "none", "rows": 0}, []
    said: JSON = {"status": "waiting" if found.status == "running" else found.status, "rows": None, "page": page_of(spec)}
    if found.status != "ready" or not found.result:
        return said, []
    said |= {"rows": found.result["overlap"], "held_out": found.result["validation"]}
    return said, [words(spec, found.result)] if found.result["overlap"] else []


def page_of(spec: JobSpec) -> str:
    """The page that shows both sides of this spec's split."""
    query: dict[str, Any] = {"side": "overlap", "fraction": spec.run.validation_fraction, "seed": spec.split_seed}
    if spec.validation is not None:
        query["validation"] = ids.public(ids.DATASET, spec.validation.id)
    elif spec.split is not None:
        query |= {"method": spec.split.method, "column": spec.split.column or ""}
    return f"/datasets/{ids.public(ids.DATASET, spec.dataset.id)}/split?{urlencode(query)}"


def words(spec: JobSpec, result: dict[str, Any]) -> str:
    """The warning: how many, how similar, which lines, and where they can be removed at once."""
    count, whole = result["overlap"], result["whole"]
    some = gettext("%(whole)s as whole rows, %(prompts)s by their prompt", whole=human_number(whole), prompts=human_number(count - whole))
    alike = {0: gettext("by their prompt"), count: gettext("as whole rows")}.get(whole, some)
    lines = ", ".join(human_number(item["line"]) for item in result["examples"][:NAMED]) + (", …" if count > NAMED else "")
    return ngettext(
        "%(num)s of the %(rows)s validation rows is also in the training set of %(dataset)s, %(alike)s (validation line %(lines)s). "
        "Metrics on them look better than they are. "
        "The split page lists every line and removes them from the training set with one click.",
        "%(num)s of the %(rows)s validation rows are also in the training set of %(dataset)s, %(alike)s (validation lines %(lines)s). "
        "Metrics on them look better than they are. "
        "The split page lists every line and removes them from the training set with one click.",
        count,
        rows=human_number(result["validation"]),
        dataset=spec.dataset.name,
        alike=alike,
        lines=lines,
    )


def resolve_waiting(session: Session) -> int:
    """Add answers that have arrived to the jobs that were created before them. Called by the task that answered, and by the
    reaper. Returns to how many."""
    waiting, resolved = Job.estimate["overlap"]["status"].astext == "waiting", 0
    for job in session.scalars(select(Job).where(waiting, Job.deleted_at.is_(None)).with_for_update(skip_locked=True)):
        try:
            spec = JobSpec.model_validate(job.spec)
        except ValidationError:
            continue  # of an earlier version: no reason for the reaper to stop
        overlap, warnings = leakage_summary(session, spec)
        if overlap["status"] != "waiting" and job.estimate is not None:
            job.estimate = job.estimate | {"overlap": overlap, "warnings": [*job.estimate.get("warnings", []), *warnings]}
            resolved += 1
    return resolved
