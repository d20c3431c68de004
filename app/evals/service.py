"""Evals and their runs.

    queued ──claim──▶ in_progress ──▶ completed       every item is graded, or could not be
      ▲                  │ ├────────▶ failed          the items cannot be read
      └─────expire───────┘ └────────▶ canceled        what was graded until then is kept

A web process runs them (`app/web/eval_runner.py`). Items are stored as they are graded, so whoever takes a run over goes on where the
last one was, and no item is graded twice.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Select, delete, func, insert, select, update
from sqlalchemy.orm import Session

from app import graders, leases, ownership
from app.errors import BadField, NotFound
from app.evals import criteria, sources
from app.evals.sources import CompletionsDataSource, DataSource, FileId, StoredCompletions
from app.inference import judges, playground, stored
from app.kit import ids, stats
from app.kit.humanize import human_number
from app.kit.json_safe import storable
from app.languages import gettext
from app.settings import get_settings
from app.storage import files
from app.tables import JSON, Eval, EvalItem, EvalRun, Exchange, User
from app.webhooks import service as webhooks

OPEN = ("queued", "in_progress")
STORED = ("logs", "stored_completions")
"""Types of evals whose items are stored chat completions; OpenAI's API has two names for one thing."""
STORED_ITEM: JSON = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "model": {"type": "string"},
        "created_at": {"type": "integer"},
        "metadata": {"type": "object"},
        "input": {"type": "array", "items": {"type": "object"}},
        "tools": {"type": "array", "items": {"type": "object"}},
    },
    "required": ["input"],
}
"""The schema of such an item: `input` has the messages that were sent."""


# Evals ------------------------------------------------------------------------------------------------------------------


def create(session: Session, user: User, name: str, config: JSON, given: Sequence[Any], metadata: JSON | None) -> Eval:
    """A new eval. Raises BadField for criteria and data sources that do not work here, and NotFound for a judge that is not there."""
    _check_config(config)
    found = criteria.read(given)
    judges.resolve(session, user, [one.grader for one in found])
    made = Eval(
        id=uuid.uuid4(), owner_id=user.id, project_id=user.project_id, name=name.strip() or found[0].grader.name,
        data_source_config=storable(config), criteria=storable(list(given)), user_metadata=storable(metadata),
    )  # fmt: skip
    session.add(made)
    session.flush()
    session.refresh(made)
    return made


def _check_config(config: JSON) -> None:
    """Raises BadField for the configuration of a data source that does not work here."""
    kind, where = config.get("type"), "data_source_config"
    if kind != "custom" and kind not in STORED:
        where = f"{where}.type"
        said = gettext("%(field)s is %(value)s.", field=where, value=repr(str(kind)[:40]))
        raise BadField(said, hint=gettext("There are custom, logs and stored_completions."), param=where)
    if unknown := set(config) - {"type", *(("metadata",) if kind in STORED else ("item_schema", "include_sample_schema"))}:
        named = min(unknown)[:60]
        said = gettext("%(field)s of the type %(type)s has no field %(name)s.", field=where, type=kind, name=repr(named))
        raise BadField(said, param=f"{where}.{named}")
    if kind == "custom" and (fault := graders.schema_fault(config.get("item_schema"), f"{where}.item_schema")):
        raise BadField(f"{fault}.", hint=gettext("Send a JSON schema of an item."), param=f"{where}.item_schema")
    pairs = config.get("metadata")
    if pairs is not None and not (isinstance(pairs, dict) and all(isinstance(value, str) for value in pairs.values())):
        where = f"{where}.metadata"
        raise BadField(gettext("%(field)s holds something else than texts by name.", field=where), param=where)


def item_schema(found: Eval) -> JSON:
    """The JSON schema of the items of an eval."""
    config = found.data_source_config
    schema: JSON = STORED_ITEM if config["type"] in STORED else config["item_schema"]
    return schema


def get(session: Session, user: User, eval_id: uuid.UUID) -> Eval:
    return ownership.owned(session, Eval, user, eval_id)


def mine(user: User) -> Select[Eval]:
    return ownership.mine(Eval, user)


def delete_eval(session: Session, found: Eval) -> None:
    """Delete an eval and its runs; those that run are stopped."""
    found.deleted_at = func.clock_timestamp()
    gone = update(EvalRun).where(EvalRun.eval_id == found.id, EvalRun.deleted_at.is_(None))
    session.execute(gone.values(deleted_at=func.clock_timestamp(), lease_until=None))
    session.flush()


def to_json(found: Eval) -> JSON:
    config = found.data_source_config
    of_stored = config["type"] in STORED
    sample = {"sample": {"type": "object"}} if of_stored or config.get("include_sample_schema") else {}
    schema = {"type": "object", "properties": {"item": item_schema(found), **sample}, "required": ["item", *sample]}
    return {
        "id": ids.public(ids.EVAL, found.id),
        "object": "eval",
        "name": found.name,
        "data_source_config": {"type": config["type"], "schema": schema, **({"metadata": config.get("metadata")} if of_stored else {})},
        "testing_criteria": found.criteria,
        "metadata": found.user_metadata,
        "created_at": int(found.created_at.timestamp()),
    }


# Runs -------------------------------------------------------------------------------------------------------------------


def create_run(session: Session, user: User, found: Eval, name: str, source: DataSource, metadata: JSON | None) -> EvalRun:
    """A queued run. Raises NotFound for a file or a model that is not there, BadField for items that do not fit the eval's schema."""
    stored_ids = None
    if isinstance(source, CompletionsDataSource) and source.model is not None:
        playground.speaker(session, user, source.model)
    if isinstance(source.source, StoredCompletions):
        stored_ids = _stored_ids(session, user, found, source.source)
    elif isinstance(source.source, FileId):
        file = files.get(session, user, ids.parse(ids.FILE, source.source.id, param="data_source.source.id"))
        files.content(session, user, file.id)
    else:
        for place, one in enumerate(source.source.content):
            check_item(found, one.item, f"data_source.source.content.{place}.item")
    run = EvalRun(
        id=uuid.uuid4(), owner_id=user.id, project_id=user.project_id, eval_id=found.id, name=name.strip() or "run",
        data_source=storable(source.model_dump(mode="json", exclude_unset=True)), stored_ids=stored_ids, user_metadata=storable(metadata),
    )  # fmt: skip
    session.add(run)
    session.flush()
    session.refresh(run)
    return run


def _stored_ids(session: Session, user: User, found: Eval, wanted: StoredCompletions) -> list[str]:
    """The stored chat completions of a run, newest first: those of the eval that the run means. Raises BadField for none and too many."""
    query = stored.chosen(user, wanted.model_copy(update={"limit": wanted.limit or sources.MAX_ITEMS + 1}))
    if pairs := found.data_source_config.get("metadata"):
        query = query.where(Exchange.user_metadata.contains(pairs))
    chosen = session.scalars(query.with_only_columns(Exchange.id)).all()
    if not chosen:
        hint = gettext("Ask with store: true first, or widen the filters of the run and of the eval.")
        raise BadField(gettext("No stored chat completion fits this."), hint=hint, param="data_source.source")
    if len(chosen) > sources.MAX_ITEMS:
        most = human_number(sources.MAX_ITEMS)
        said = gettext("More than %(most)s stored chat completions fit this.", most=most)
        hint = gettext("Send a limit of at most %(most)s, or narrow the filters.", most=most)
        raise BadField(said, hint=hint, param="data_source.source.limit")
    return [str(key) for key in chosen]


def check_item(found: Eval, item: JSON, where: str) -> None:
    """Raises BadField for an item that does not follow the eval's schema."""
    if not graders.follows(item_schema(found), item):
        said = gettext("%(field)s does not follow the item_schema of the eval.", field=where)
        raise BadField(said, hint=gettext("Change the item, or the eval."), param=where)


def runs_of(user: User, found: Eval, status: str | None = None) -> Select[EvalRun]:
    more = [EvalRun.status == status] if status else []
    return ownership.mine(EvalRun, user, EvalRun.eval_id == found.id, *more)


def get_run(session: Session, user: User, eval_id: uuid.UUID, run_id: uuid.UUID) -> EvalRun:
    run = ownership.owned(session, EvalRun, user, run_id)
    if run.eval_id != eval_id:
        raise NotFound(gettext("No such run of this eval: %(id)s", id=ids.public(ids.EVAL_RUN, run_id)), param="run_id")
    return run


def cancel(session: Session, run: EvalRun) -> EvalRun:
    """Ask nothing more. What was graded is kept; a run that has ended is unchanged."""
    session.refresh(run, with_for_update=True)
    if run.status == "queued" and run.lease_until is None:
        run.status, run.finished_at = "canceled", func.clock_timestamp()
        _tell(session, run)
    elif run.status in OPEN:
        run.cancel_requested = True
    session.flush()
    session.refresh(run)
    return run


def delete_run(session: Session, run: EvalRun) -> None:
    """Delete a run and its items; one that runs is stopped."""
    run.deleted_at, run.lease_until = func.clock_timestamp(), None
    session.execute(delete(EvalItem).where(EvalItem.run_id == run.id))
    session.flush()


def run_json(run: EvalRun) -> JSON:
    settings, eval_id = get_settings(), ids.public(ids.EVAL, run.eval_id)
    address = (settings.public_url or f"http://{settings.host}:{settings.port}").rstrip("/")
    return {
        "id": ids.public(ids.EVAL_RUN, run.id),
        "object": "eval.run",
        "eval_id": eval_id,
        "name": run.name,
        "status": run.status,
        "model": run.data_source.get("model") or "",
        "data_source": run.data_source,
        "error": run.error,
        "per_model_usage": [{"model_name": name, **used} for name, used in sorted(run.usage.items())],
        "per_testing_criteria_results": run.criteria_counts,
        "result_counts": {"total": run.total, "passed": run.passed, "failed": run.failed, "errored": run.errored},
        "report_url": f"{address}/evals/{eval_id}?run={ids.public(ids.EVAL_RUN, run.id)}",
        "metadata": run.user_metadata,
        "created_at": int(run.created_at.timestamp()),
    }


def items_of(run: EvalRun, status: str | None = None) -> Select[EvalItem]:
    more = [EvalItem.status == status] if status else []
    return select(EvalItem).where(EvalItem.run_id == run.id, *more)


def item_json(run: EvalRun, row: EvalItem) -> JSON:
    return {
        "id": ids.public(ids.EVAL_ITEM, row.id),
        "object": "eval.run.output_item",
        "eval_id": ids.public(ids.EVAL, run.eval_id),
        "run_id": ids.public(ids.EVAL_RUN, run.id),
        "status": row.status,
        "datasource_item_id": row.place,
        "datasource_item": row.item,
        "results": row.results,
        "sample": row.sample,
        "created_at": int(row.created_at.timestamp()),
    }


def pass_rate(run: EvalRun) -> tuple[float, float, float] | None:
    """Share of the graded items that passed, with its 95% interval; None before any was graded."""
    graded = run.passed + run.failed
    if not graded:
        return None
    low, high = stats.interval([1.0] * run.passed + [0.0] * run.failed)
    return run.passed / graded, low, high


# Who runs it ------------------------------------------------------------------------------------------------------------


def _died(session: Session, run: EvalRun, how: str) -> None:
    if leases.requeue(session, WORK, run, died=True):
        return
    message = f"The process that ran it {how} That was death {run.deaths} without an item graded between."
    run.status, run.finished_at, run.error = "failed", session.scalar(select(leases.now())), {"code": "crashed", "message": message}
    _tell(session, run)


WORK = leases.Work(EvalRun, None, waits_as="queued", runs_as="in_progress", since=EvalRun.created_at, on_death=_died)


def claim_next(session: Session) -> EvalRun | None:
    """The oldest run that waits, now held by the caller; None without any."""
    free = select(EvalRun.id).where(WORK.free()).order_by(EvalRun.created_at).limit(1).with_for_update(skip_locked=True)
    key = session.scalar(free)
    return leases.claim(session, WORK, key) if key is not None else None


def graded_places(session: Session, run_id: uuid.UUID) -> set[int]:
    return set(session.scalars(select(EvalItem.place).where(EvalItem.run_id == run_id)))


def store(session: Session, run_id: uuid.UUID, fence: int, rows: Sequence[JSON], total: int | None = None) -> EvalRun | None:
    """Renew the lease and store graded items, with the counts of all; None when the lease is lost, and then nothing is stored."""
    run = leases.lock_if_held(session, WORK, run_id, fence)
    if run is None:
        return None
    run.total = run.total if total is None else total
    if rows:
        stored = [{name: row[name] for name in ("place", "status", "item", "sample", "results")} for row in rows]
        session.execute(insert(EvalItem), [storable({"id": uuid.uuid4(), "run_id": run_id} | row) for row in stored])
        for name, status in (("passed", "pass"), ("failed", "fail"), ("errored", "error")):
            setattr(run, name, getattr(run, name) + sum(row["status"] == status for row in rows))
        run.criteria_counts, run.usage, run.deaths = _counted(run.criteria_counts, rows), _used(run.usage, rows), 0
    run.lease_until = leases.lease()
    session.flush()
    session.refresh(run)
    return run


def _counted(counts: Sequence[JSON], rows: Sequence[JSON]) -> list[JSON]:
    """The counts of every criterion, in the order of the criteria, with those of some more items."""
    found = {one["testing_criteria"]: dict(one) for one in counts}
    for result in (result for row in rows for result in row["results"]):
        one = found.setdefault(result["name"], {"testing_criteria": result["name"], "passed": 0, "failed": 0})
        one["passed" if result["passed"] else "failed"] += 1
    return list(found.values())


def _used(usage: JSON, rows: Sequence[JSON]) -> JSON:
    found = {name: dict(one) for name, one in usage.items()}
    for name, used in ((name, used) for row in rows for name, used in row["usage"].items()):
        one = found.setdefault(
            name, dict.fromkeys(("invocation_count", "prompt_tokens", "completion_tokens", "cached_tokens", "total_tokens"), 0)
        )
        for key, value in used.items():
            one[key] += value
    return found


def finish(session: Session, run_id: uuid.UUID, fence: int, *, error: JSON | None = None) -> bool:
    """End a run: failed with an error, canceled where that was asked for, and completed otherwise. False when the lease is lost."""
    run = leases.lock_if_held(session, WORK, run_id, fence)
    if run is None:
        return False
    left = run.passed + run.failed + run.errored < run.total
    run.status = "failed" if error else "canceled" if run.cancel_requested and left else "completed"
    run.error, run.lease_until, run.finished_at = storable(error), None, session.scalar(select(leases.now()))
    _tell(session, run)
    session.flush()
    return True


def release(session: Session, run_id: uuid.UUID, fence: int) -> None:
    """Let another process go on with it, as a web process that is stopped does."""
    leases.finish_if_held(session, WORK, run_id, fence, status="queued")


def reap(session: Session) -> dict[str, int]:
    """One round of the reaper."""
    return leases.reap(session, WORK)


def _tell(session: Session, run: EvalRun) -> None:
    what = {"completed": "succeeded"}.get(run.status, run.status)
    webhooks.emit(session, run.project_id, f"eval.run.{what}", ids.public(ids.EVAL_RUN, run.id), run.id)


def the_source(run: EvalRun) -> DataSource:
    """The data source of a run, as it was checked when it was made."""
    return sources.read(run.data_source)
