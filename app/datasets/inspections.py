"""Cached questions about a dataset that need a child of the data worker.

    ask ─→ waiting ──answer()──→ ready | error
             ↑         │
             └─ death ─┘          at the third one it is an error

The web process asks, waits a moment, and shows the answer or a page that polls. A question is answered once, because a version of
a dataset never changes.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from datetime import timedelta
from typing import Any

from sqlalchemy import delete, func, or_, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app import db, leases, queue
from app.datasets import service as datasets
from app.errors import Conflict, StudioError
from app.kit import sandbox
from app.languages import gettext
from app.run_settings import RunSettings
from app.settings import get_settings
from app.spec import ModelRef
from app.storage import files, places
from app.tables import Dataset, File, Finding, Inspection, Model

FUNCTIONS = {
    "lengths": "worker.data.inspection:lengths",
    "rows": "worker.data.inspection:rows",
    "split": "app.datasets.splits:look",
    "side": "app.datasets.splits:side",
    "line": "app.datasets.raw_line:look",
    "changes": "app.datasets.changes:look",
}
"""The functions that the child runs, by name because nothing here imports the worker."""
LIMITS = sandbox.Limits(seconds=1800, cpu_seconds=3600)
ASK_AGAIN_SECONDS = 20
ANSWERS = 5
"""Version of the answers, increased when the same question is answered differently, so that older answers are not used."""
TOKEN_RULES = ("over_long", "nothing_left", "template_refuses")


def ask(
    session: Session, dataset: Dataset, kind: str, arguments: dict[str, Any], model: Model | None = None, *, announce: bool = True
) -> Inspection:
    """The inspection for this question, enqueued when it is new or failed a while ago; `announce` is False for one whose answer
    exists already."""
    if dataset.status != "ready":
        said = gettext("The dataset %(name)s is %(status)s.", name=dataset.name, status=gettext(dataset.status))
        raise Conflict(said, hint=gettext("Wait until it is ready."))
    asked = json.dumps(
        [str(dataset.id), str(model.id) if model else None, model.revision if model else None, kind, arguments, ANSWERS],
        sort_keys=True,
    )
    question = hashlib.sha256(asked.encode()).hexdigest()
    known = select(Inspection).where(Inspection.question == question).execution_options(populate_existing=True)
    found = session.scalars(known).one_or_none()
    if found is not None and found.status != "error":
        return found
    values = {"id": uuid.uuid4(), "dataset_id": dataset.id, "model_id": model.id if model else None, "kind": kind}
    new = session.scalar(
        insert(Inspection)
        .values(**values, arguments=arguments, question=question)
        .on_conflict_do_nothing(index_elements=["question"])
        .returning(Inspection.id)
    )
    if announce and new:
        queue.enqueue(session, queue.INSPECT, new)
    elif announce:
        quiet = leases.now() - timedelta(seconds=ASK_AGAIN_SECONDS)
        failed = select(Inspection).where(Inspection.question == question, Inspection.status == "error", Inspection.asked_at < quiet)
        again = session.scalar(failed.with_for_update(skip_locked=True).execution_options(populate_existing=True))
        if again is not None:
            again.asked_at = session.execute(select(leases.now())).scalar_one()
            again.error, again.deaths = None, 0
            leases.requeue(session, WORK, again)
    return session.scalars(known).one()


def wait(inspection_id: uuid.UUID, seconds: float) -> Inspection:
    """The inspection once it is answered, or as it is after `seconds`. Holds no database connection while it waits."""
    deadline, pause = time.monotonic() + seconds, 0.01
    while True:
        with db.transaction() as session:
            found = session.get_one(Inspection, inspection_id)
        if found.status in ("ready", "error") or time.monotonic() > deadline:
            return found
        time.sleep(pause)
        pause = min(2 * pause, 0.08)


def tokenizer_of(session: Session, model: Model) -> str:
    """The folder of a model's tokenizer, relative to the data folder: the newest adapter's own, or the base's."""
    from app.models import service as models
    from app.models.vocabulary import tokenizer_path

    return tokenizer_path(models.reference(session, model))


# In the data worker ---------------------------------------------------------------------------------------------------


def _died(session: Session, found: Inspection, how: str) -> None:
    if not leases.requeue(session, WORK, found, died=True):
        message = f"It could not be computed. Its worker {how} That was death {found.deaths}."
        found.status, found.error = "error", {"message": message, "hint": "Look at the worker's log, then try again."}


WORK = leases.Work(Inspection, queue.INSPECT, waits_as="waiting", runs_as="running", since=Inspection.asked_at, on_death=_died)


def answer(inspection_id: uuid.UUID) -> None:
    """Body of the task INSPECT: claim, run a child, record. Ignored while another worker holds the question."""
    with db.transaction() as session:
        found = leases.claim(session, WORK, inspection_id)
        payload = _payload(session, found) if found is not None else None
    if found is None:
        return
    try:
        if payload is None:
            raise Conflict("The dataset, its file or the model was deleted.", hint="Choose another.")
        result, error = (
            sandbox.run(
                FUNCTIONS[found.kind],
                payload,
                LIMITS,
                folder=get_settings().folder("tmp"),
                read=[payload[name] for name in ("rows", "validation", "before", "path", "tokenizer") if name in payload],
                keep_going=leases.Beat(WORK, inspection_id, found.fence),
            ),
            None,
        )
    except sandbox.Refused as refused:
        result, error = None, refused.error
    except sandbox.Killed as killed:
        result, error = None, {"message": f"It could not be computed. {killed.message}", "hint": "Try again, or with another model."}
    except StudioError as fault:
        result, error = None, fault.as_problem()
    with db.transaction() as session:
        values = {"status": "ready" if error is None else "error", "result": result, "error": error, "deaths": 0}
        leases.finish_if_held(session, WORK, inspection_id, found.fence, **values)


def _payload(session: Session, found: Inspection) -> dict[str, Any] | None:
    dataset, model = session.get_one(Dataset, found.dataset_id), session.get(Model, found.model_id) if found.model_id else None
    if dataset.deleted_at is not None or not dataset.rows_path or (found.model_id and (model is None or model.deleted_at is not None)):
        return None
    payload = {**found.arguments, "rows": str(places.path(dataset.rows_path)), "count_of_rows": dataset.good_rows, "task": dataset.task}
    payload.setdefault("count", dataset.good_rows)
    for name in ("validation", "before"):
        if other := payload.get(f"{name}_rows"):
            payload[name] = str(places.path(other))
    if found.kind == "line":
        file = session.get(File, dataset.file_id) if dataset.file_id else None
        if file is None or file.deleted_at is not None:
            return None
        payload |= {"path": str(files.brought(file.sha256)), "filename": file.filename, "format": dataset.format}
        payload |= {"mapping": dataset.mapping, "edits": dataset.edits or []}
    if model is not None:
        payload |= {"tokenizer": str(places.path(tokenizer_of(session, model), weights=False)), "kind": model.kind}
    return payload


def reap(session: Session) -> dict[str, int]:
    """One round of the reaper."""
    return leases.reap(session, WORK)


KEPT_DAYS = {"rows": 7, "side": 7, "line": 1}
"""Answers about a page of rows are cheap to compute; all others are kept as long as their dataset."""


def sweep(session: Session, at_most: int = 1000) -> int:
    """Remove answers about deleted datasets and expired ones. Returns how many."""
    old = [
        (Inspection.kind == kind) & (Inspection.asked_at < func.clock_timestamp() - timedelta(days=days))
        for kind, days in KEPT_DAYS.items()
    ]
    gone = select(Dataset.id).where(Dataset.id == Inspection.dataset_id, Dataset.deleted_at.is_not(None)).exists()
    idle = or_(Inspection.lease_until.is_(None), leases.lapsed(Inspection.lease_until))
    found = select(Inspection.id).where(or_(gone, *old), idle).limit(at_most).with_for_update(skip_locked=True)
    return len(session.execute(delete(Inspection).where(Inspection.id.in_(found)).returning(Inspection.id)).all())


# What the trainer's converter says of every row -------------------------------------------------------------------------


def counting(session: Session, model: Model) -> dict[str, Any]:
    """What a child needs to count a dataset's tokens as this model's trainer would, truncated at the default max sequence length."""
    folder = str(places.path(tokenizer_of(session, model), weights=False))
    return {"tokenizer": folder, "tokenizer_name": model.name, "kind": model.kind, "cutoff": report_cutoff(model)}


def report_cutoff(model: Model) -> int:
    return min(RunSettings().max_length, int((model.shape or {}).get("positions") or 1 << 30))


def keep_lengths(session: Session, dataset: Dataset, model: Model, result: dict[str, Any]) -> None:
    """Store the lengths that were counted while a dataset was parsed, as the answer for its page of rows."""
    found = ask(session, dataset, "lengths", {"cutoff": report_cutoff(model)}, model, announce=False)
    found.result = {name: value for name, value in result.items() if name != "report"}
    found.status, found.lease_until, found.error = "ready", None, None


def stats_for(session: Session, dataset: Dataset, ref: ModelRef) -> datasets.DatasetStats:
    """The totals of a dataset with its tokens counted by this model's tokenizer. Where another tokenizer counted when the dataset
    was parsed, a count is enqueued, and the other's numbers are used until it is done."""
    found = datasets.stats(dataset)
    model = session.get(Model, ref.id)
    while model is not None and model.base_id is not None:  # its base has the same tokenizer
        model = session.get(Model, model.base_id)
    counted_by = (dataset.report or {}).get("tokenizer")
    if model is None or not model.path or counted_by in (None, model.name) or dataset.status != "ready":
        return found
    own = ask(session, dataset, "lengths", {"cutoff": report_cutoff(model)}, model).result or {}
    return found.model_copy(update={name: own[name] for name in ("tokens", "trained_tokens", "longest") if name in own})


def add_to_report(session: Session, dataset: Dataset, result: dict[str, Any], said: list[dict[str, Any]]) -> None:
    """Add the renderer's findings to the report of a dataset that was parsed before there was a model."""
    session.execute(delete(Finding).where(Finding.dataset_id == dataset.id, Finding.rule.in_(TOKEN_RULES)))
    for at in range(0, len(said), 1000):
        session.execute(insert(Finding), [{"dataset_id": dataset.id, **finding} for finding in said[at : at + 1000]])
    report = dict(dataset.report or {})
    found = {rule: entry for rule, entry in report.get("findings", {}).items() if rule not in TOKEN_RULES}
    for finding in said:
        rule = finding["rule"]
        found.setdefault(rule, {"severity": finding["severity"], "count": result["counts"][rule], "message": finding["message"]})
    dataset.report = report | {"findings": found} | result["report"]
    queue.notify(session, "dataset", dataset.id)
