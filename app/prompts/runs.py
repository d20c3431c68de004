"""Prompt runs: one version of a prompt on one model, over the validation rows of one dataset.

    queued ──claim──▶ running ──finish──▶ succeeded
      ▲                 │  ├────fail────▶ failed
      └──── expire ─────┘  └───cancel───▶ cancelled      rows scored so far are kept

Results are stored row by row, so a run whose worker died resumes where it was.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sqlalchemy import ColumnElement, Select, func, select
from sqlalchemy.orm import Session

from app import formats, graders, leases, limits, objectives, ownership, queue, saved_graders
from app.datasets import service as datasets
from app.errors import BadField, Conflict, problem_json
from app.inference import judges, playground
from app.inference.judges import ResolvedJudge
from app.inference.protocol import ExternalEngine
from app.jobs.request import bad_field
from app.kit import ids, stats
from app.kit.json_safe import storable
from app.languages import gettext
from app.ownership import owned
from app.planning.schedule import held_out_share
from app.prompts.service import PromptBody
from app.spec import DatasetRef, JobSpec, ModelRef, Split
from app.tables import JSON, Dataset, Job, Model, Prompt, PromptResult, PromptRun, PromptVersion, User


class TrainedRows(BaseModel):
    """The rows that one job in a model's lineage was trained on, of this dataset or another version of it: all except its
    validation rows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: DatasetRef
    validation_fraction: float
    seed: int
    split: Split | None = None


class RunSpec(BaseModel):
    """The immutable spec of a run, everything that the worker gets."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    owner: uuid.UUID
    body: PromptBody
    model: ModelRef
    engine: ExternalEngine | None = None
    dataset: DatasetRef
    task: str
    part: Literal["validation", "all"]
    rows: int
    validation_fraction: float  # 1: all rows are validation rows
    split_seed: int
    split: Split | None = None
    learnt: tuple[TrainedRows, ...] = ()
    grader: dict[str, Any] | None = None  # where the metric is a grader
    judges: tuple[ResolvedJudge, ...] = ()
    trial: bool = False  # a trial of the form, which is in no list


class RunOrder(BaseModel):
    """Which rows: `validation` are the validation rows of the job that fine-tuned the model, or of a job with this fraction and
    seed.

    Rows that the model or one of `beside` was trained on are excluded, so that all these models can be given the same rows.
    """

    model_config = ConfigDict(extra="forbid")

    part: Literal["validation", "all"] = "validation"
    rows: int = Field(100, ge=1, le=100_000)
    validation_fraction: float | None = Field(None, gt=0, lt=1)
    split_seed: int | None = Field(None, ge=0, le=2**31 - 1)
    beside: list[str] = Field([], max_length=16, description="Models this one is compared with.")
    raw: bool = Field(False, description="Send the prompt as plain text, without the model's chat template: the model continues it.")


def read_order(given: JSON) -> RunOrder:
    try:
        return RunOrder.model_validate(given)
    except ValidationError as error:
        raise bad_field(error) from None


def create(
    session: Session, user: User, version: PromptVersion, model: str, dataset: Dataset, order: RunOrder, *, trial: bool = False
) -> PromptRun:
    """A queued run and its message. Raises NotFound, Conflict while either is not ready, BadField for rows without answers, LimitReached."""
    limits.check(session, user, "tokens_per_day")
    who = playground.speaker(session, user, model)
    ref, entry = datasets.reference(dataset), objectives.get(dataset.task)
    if not formats.asks(ref.format) or not entry.scored:
        raise BadField(
            gettext("The rows of %(name)s have no reference answers.", name=dataset.name),
            hint=gettext("Take a dataset of instructions, conversations, completions or labels."),
            param="dataset_id",
        )
    body = PromptBody(**version.body)
    if body.score == "label" and not entry.classifies:
        raise BadField(
            gettext("%(name)s has no labels to score by.", name=dataset.name),
            hint=gettext("Score by exact match or contains."),
            param="score",
        )
    held = _held_out(session, user, [who, *(playground.speaker(session, user, name) for name in order.beside)], dataset, order)
    if body.shots and (order.part == "all" or held["validation_fraction"] == 1) and body.choose != "chosen":
        raise BadField(
            gettext("Examples come from the training set, and a run over all rows leaves none."),
            hint=gettext("Run on the validation set, or use fixed rows as examples."),
            param="part",
        )
    graded = saved_graders.named(session, user, [body.grader], "grader") if body.grader else []
    ref_asked = who.ref.model_copy(update={"kind": "generic"}) if order.raw else who.ref  # which is sent the text alone
    spec = RunSpec(
        owner=user.id, body=body, model=ref_asked, engine=who.engine, dataset=ref, task=entry.name, part=order.part,
        rows=order.rows, grader=graders.to_json(graded[0]) if graded else None, judges=judges.resolve(session, user, graded), trial=trial, **held,
    )  # fmt: skip
    run = PromptRun(
        id=uuid.uuid4(), owner_id=user.id, project_id=user.project_id, version_id=version.id, model_id=who.resolved.model.id, dataset_id=dataset.id,
        spec=storable(spec.model_dump(mode="json")),
    )  # fmt: skip
    session.add(run)
    session.flush()
    queue.enqueue(session, queue.PROMPT, run.id)
    session.refresh(run)
    return run


def _held_out(session: Session, user: User, speakers: Sequence[playground.ResolvedModel], dataset: Dataset, order: RunOrder) -> JSON:
    """The validation rows, in RunSpec's terms: the split of the first job trained on this dataset, and what all were trained on."""
    kin = set(datasets.family(session, dataset))
    learnt: list[TrainedRows] = []
    found: tuple[float, int, Split | None] | None = None
    for job in {job.id: job for who in speakers for job in _past(session, who)}.values():
        spec = JobSpec.model_validate(job.spec)
        share = 0.0 if spec.validation else spec.run.validation_fraction
        if spec.validation and spec.validation.id == dataset.id:
            found = found or (1.0, spec.run.seed, None)
        if spec.dataset.id in kin:
            learnt.append(TrainedRows(dataset=spec.dataset, validation_fraction=share, seed=spec.run.seed, split=spec.split))
            found = found or ((share, spec.run.seed, spec.split) if spec.dataset.id == dataset.id and share else None)
    usual = held_out_share(dataset.good_rows or 0)
    fraction, seed, split = found or (usual, 42, None)
    if order.validation_fraction is not None or order.split_seed is not None:
        fraction, seed, split = order.validation_fraction or usual, 42 if order.split_seed is None else order.split_seed, None
    return {"validation_fraction": fraction, "split_seed": seed, "split": split, "learnt": tuple(learnt)}


def _past(session: Session, who: playground.ResolvedModel) -> list[Job]:
    """The jobs in a model's lineage, newest first."""
    found, model = [], who.resolved.model
    key = who.resolved.checkpoint.job_id if who.resolved.checkpoint else model.job_id
    while True:
        job = session.get(Job, key) if key else None
        found += [job] if job else []
        if model.base_id is None:
            return found
        base = session.get(Model, model.base_id)
        if base is None:
            return found
        model, key = base, base.job_id


# Looking ------------------------------------------------------------------------------------------------------------


def mine(user: User) -> Select[PromptRun]:
    return ownership.mine(PromptRun, user)


def is_trial() -> ColumnElement[bool]:
    return func.coalesce(PromptRun.spec["trial"].as_boolean(), False)


def trial(session: Session, run_id: uuid.UUID) -> bool:
    return bool(session.scalar(select(PromptRun.id).where(PromptRun.id == run_id, is_trial())))


def get(session: Session, user: User, run_id: uuid.UUID) -> PromptRun:
    return owned(session, PromptRun, user, run_id)


def of_prompt(session: Session, user: User, prompt: Prompt) -> Select[PromptRun]:
    return mine(user).where(PromptRun.version_id.in_(select(PromptVersion.id).where(PromptVersion.prompt_id == prompt.id)))


def results(session: Session, run: PromptRun, after: int = 0, limit: int = 50) -> list[PromptResult]:
    """Rows in the order of the dataset, starting after line `after`."""
    query = select(PromptResult).where(PromptResult.run_id == run.id, PromptResult.line > after).order_by(PromptResult.line).limit(limit)
    return list(session.scalars(query))


def table(session: Session, user: User, limit: int = 200) -> list[tuple[Dataset, list[tuple[PromptRun, Prompt, PromptVersion]]]]:
    """All runs by dataset, the newest dataset first, and in each the best score first: prompts and fine-tuned models in one table."""
    query = (
        select(PromptRun, Prompt, PromptVersion, Dataset)
        .join(PromptVersion, PromptVersion.id == PromptRun.version_id)
        .join(Prompt, Prompt.id == PromptVersion.prompt_id)
        .join(Dataset, Dataset.id == PromptRun.dataset_id)
        .where(PromptRun.project_id == user.project_id, PromptRun.deleted_at.is_(None), ~is_trial())
        .order_by(PromptRun.created_at.desc())
        .limit(limit)
    )
    found: dict[uuid.UUID, tuple[Dataset, list[Any]]] = {}
    for run, prompt, version, dataset in session.execute(query):
        found.setdefault(dataset.id, (dataset, []))[1].append((run, prompt, version))
    for _, rows in found.values():
        rows.sort(key=lambda row: -(row[0].result or {}).get("score", -1.0))
    return list(found.values())


def to_json(run: PromptRun) -> JSON:
    spec = run.spec
    return {
        "id": ids.public(ids.RUN, run.id),
        "object": "prompt.run",
        "status": run.status,
        "model": spec["model"]["name"],
        "revision": spec["model"]["revision"],
        "dataset": spec["dataset"]["name"],
        "dataset_id": ids.public(ids.DATASET, run.dataset_id),
        "part": spec["part"],
        "validation_fraction": spec["validation_fraction"],
        "split_seed": spec["split_seed"],
        "score_rule": spec["body"]["score"],
        "progress": run.progress,
        "result": run.result,
        "error": problem_json(run.error),
        "created_at": int(run.created_at.timestamp()),
        "finished_at": int(run.finished_at.timestamp()) if run.finished_at else None,
    }


def result_json(row: PromptResult) -> JSON:
    names = ("line", "input", "rendered_prompt", "expected", "said", "answer", "score")
    return {name: getattr(row, name) for name in names}


def cancel(session: Session, user: User, run: PromptRun) -> PromptRun:
    """Cancel a run; rows scored so far are kept. One that has ended is unchanged."""
    session.refresh(run, with_for_update=True)
    if run.status in ("queued", "running"):
        run.status, run.lease_until, run.finished_at = "cancelled", None, func.clock_timestamp()
        run.result = _whole(session, run)
        session.flush()
    session.refresh(run)
    return run


def delete(session: Session, user: User, run: PromptRun) -> None:
    if run.status in ("queued", "running"):
        raise Conflict(gettext("The run has not ended."), hint=gettext("Cancel it first."))
    run.deleted_at = func.clock_timestamp()
    session.flush()


# Who runs it --------------------------------------------------------------------------------------------------------


def _died(session: Session, run: PromptRun, how: str) -> None:
    """Requeue a run whose worker died, or fail it when its workers die without a row scored between them."""
    if leases.requeue(session, WORK, run, died=True):
        return
    run.status, run.finished_at, run.result = "failed", session.scalar(select(leases.now())), _whole(session, run)
    message = f"Its worker {how} That was death {run.deaths} without a row scored between."
    run.error = {"code": "crashed", "message": message, "hint": "Take a smaller model; what was scored is kept."}


WORK = leases.Work(PromptRun, queue.PROMPT, waits_as="queued", runs_as="running", since=PromptRun.created_at, on_death=_died)


def claim(session: Session, run_id: uuid.UUID) -> tuple[int, RunSpec, set[int], JSON] | None:
    """The fence, the spec, the lines that are scored already and their totals; None when there is nothing to do or another worker
    holds it."""
    run = leases.claim(session, WORK, run_id)
    if run is None:
        return None
    done = set(session.scalars(select(PromptResult.line).where(PromptResult.run_id == run_id)))
    return run.fence, RunSpec.model_validate(run.spec), done, run.result or {}


def heartbeat(session: Session, run_id: uuid.UUID, fence: int, progress: float, rows: Sequence[JSON], totals: JSON) -> bool:
    """Renew the lease, and store the rows scored since the last heartbeat with the totals of all; False when the lease is lost or
    the run was cancelled. A scored row resets the count of deaths, because the run makes progress."""
    forgiven = {"deaths": 0} if rows else {}
    if not leases.heartbeat(session, WORK, run_id, fence, progress=progress, result=storable(totals), **forgiven):
        return False
    session.add_all([PromptResult(run_id=run_id, **storable(row)) for row in rows])
    session.flush()
    return True


def finish(session: Session, run_id: uuid.UUID, fence: int, *, totals: JSON | None = None, error: JSON | None = None) -> bool:
    """Record how it ended, with the score over the stored rows; False when the lease is lost."""
    values: JSON = {
        "status": "failed" if error else "succeeded",
        "result": storable((summary(session, run_id) or {}) | (totals or {})) or None,
        "error": storable(error),
        "finished_at": leases.now(),
    }
    values |= {} if error else {"progress": 1.0}
    return leases.finish_if_held(session, WORK, run_id, fence, **values)


def summary(session: Session, run_id: uuid.UUID) -> JSON | None:
    """Mean score with its 95% interval over the stored rows; None without any."""
    scores = list(session.scalars(select(PromptResult.score).where(PromptResult.run_id == run_id).order_by(PromptResult.line)))
    if not scores:
        return None
    low, high = stats.interval(scores)
    return {"score": sum(scores) / len(scores), "low": low, "high": high, "rows": len(scores)}


def _whole(session: Session, run: PromptRun) -> JSON | None:
    """The score so far together with the totals of the rows."""
    return ((summary(session, run.id) or {}) | (run.result or {})) or None


def reap(session: Session) -> dict[str, int]:
    """One round of the reaper."""
    return leases.reap(session, WORK)
