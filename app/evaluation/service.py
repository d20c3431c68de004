"""Evaluations: a model scored on a dataset, without training.

    queued ──claim──▶ running ──finish──▶ succeeded
      ▲                 │ ├────fail────▶ failed
      │                 │ └───cancel───▶ cancelled
      └─expire, release─┘        a process that died; after three deaths it failed

`scores` evaluates a model, and its base, on the same rows. `advice` measures what the advice needs of a base: how far the data is
from general text, and what a prompt alone reaches. `blend` scores interpolations between a fine-tuned model and its base.
The Celery message only says "look at this one"; the claim below decides, and every write of a worker names the fence it holds.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sqlalchemy import ColumnElement, Select, func, select, update
from sqlalchemy.orm import Session

from app import leases, limits, objectives, ownership, queue
from app.datasets import service as datasets
from app.errors import BadField, Conflict, problem_json
from app.evaluation import grading, suited
from app.inference.judges import ResolvedJudge
from app.jobs import usage
from app.jobs.request import bad_field
from app.kit import ids
from app.kit.json_safe import storable
from app.languages import gettext, mark
from app.leases import now
from app.models import interpolation
from app.models import service as models
from app.objectives import DEFAULT, Task
from app.ownership import owned
from app.planning.schedule import held_out_share
from app.spec import DatasetRef, ModelRef, Split
from app.tables import JSON, Dataset, Evaluation, Job, Model, User

Kind = Literal["scores", "advice", "blend", "predictions", "vectors"]
SCORING: tuple[Kind, ...] = ("scores", "advice", "blend")
"""The kinds of evaluations; the others only share the queue (`app/evaluation/predictions.py`)."""
Part = Literal["all", "validation"]
ROWS: dict[str, int] = {"scores": 500, "advice": 64, "blend": 200}
OPEN = ("queued", "running")
TRAINED_ON = mark(
    "The model was trained on some or all of these rows: the scores show how well it remembers them, not how well it does on new ones."
)
OTHER_VERSION = mark("The model was trained on another version of this dataset: a few of these rows may be among its training rows.")
"""Notes of an evaluation, which are stored in English."""
MAX_ROW_SCORES = 5000


class EvaluationRequest(BaseModel):
    """What is scored on what. The dataset is named by its id or by the file it was made from."""

    model_config = ConfigDict(extra="forbid")

    model: str
    dataset_id: str | None = None
    file: str | None = None
    kind: Literal["scores", "advice", "blend"] = "scores"
    rows: int | None = Field(None, ge=1, le=100_000, description="Max examples, drawn by the seed; empty takes a default.")
    part: Part | None = Field(
        None,
        description="All rows, or the validation split. Empty takes the validation split of a dataset that the model was trained on, and all rows of any other.",
    )
    validation_fraction: float | None = Field(None, gt=0, lt=1, description="Validation fraction; empty takes that of the model's job.")
    max_length: int = Field(1024, ge=8, le=131_072, description="Longer examples are truncated to this many tokens.")
    answers: int = Field(
        8, ge=0, le=2000, description="Rows that are answered in full and compared with their references; 100 where graders are named."
    )
    answer_tokens: int = Field(64, ge=1, le=1024, description="Max new tokens of such an answer.")
    forgetting: bool = Field(True, description="Score general texts too, to see what a fine-tuned model forgot.")
    graders: list[str | dict[str, Any]] = Field([], description="Graders of the answers: ids of saved graders, or graders as they are.")
    points: list[Annotated[float, Field(gt=0, lt=1)]] | None = Field(
        None, min_length=1, max_length=9, description="Points of a blend between its base (0) and itself (1); empty takes 0.25, 0.5, 0.75."
    )
    seed: int | None = Field(
        None, ge=0, le=2**31 - 1, description="Random seed of the split and the draw; empty takes that of the model's job."
    )


class EvaluationSpec(BaseModel):
    """The immutable spec of an evaluation, everything that `worker/evaluation/process.py` gets. `base` is the model that `model`
    was fine-tuned from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    task: Task
    model: ModelRef
    base: ModelRef | None = None
    dataset: DatasetRef
    rows: int
    part: Part
    validation_fraction: float = 0.1
    split: Split | None = None
    max_length: int = 1024
    answers: int = 8
    answer_tokens: int = 64
    forgetting: bool = True
    seed: int = 42
    note: str = ""
    graders: tuple[dict[str, Any], ...] = ()
    judges: tuple[ResolvedJudge, ...] = ()  # the models that they ask
    points: tuple[float, ...] = interpolation.POINTS  # of a blend
    column: str | None = None  # of predictions
    system: str = ""

    def writes(self) -> bool:
        """Whether the model generates answers."""
        classifies = bool(self.model.labels) or (self.kind != "predictions" and objectives.get(self.task).classifies)
        if classifies or self.model.shape.architecture == "encoder":
            return False
        return self.kind in ("predictions", "advice") or (self.kind == "scores" and self.answers > 0)


def read_order(body: Mapping[str, Any]) -> EvaluationRequest:
    try:
        return EvaluationRequest.model_validate({name: value for name, value in body.items() if value is not None})
    except ValidationError as error:
        raise bad_field(error) from None


# Ordering -----------------------------------------------------------------------------------------------------------


def create(session: Session, user: User, order: EvaluationRequest) -> Evaluation:
    """A queued evaluation and its message; an equal one that is queued or running is returned instead.

    Raises NotFound, BadField when the model does not support the dataset's task, Conflict while either is not ready, LimitReached.
    """
    resolved = models.resolve(session, user, order.model)
    dataset = find_dataset(session, user, order.dataset_id, order.file)
    spec = _spec(session, order, resolved, dataset)
    if order.graders:
        asked = order.answers if "answers" in order.model_fields_set else None
        spec = spec.model_copy(update=grading.ordered(session, user, order.graders, spec.kind, spec.task, spec.rows, asked))
    frozen = spec.model_dump(mode="json")
    same = mine(user).where(Evaluation.status.in_(OPEN), Evaluation.spec == frozen)
    if (earlier := session.scalar(same.limit(1))) is not None:
        return earlier
    limits.check(session, user, "gpu_hours_per_month")
    if spec.writes():
        limits.check(session, user, "tokens_per_day")
    evaluation = Evaluation(
        id=uuid.uuid4(),
        owner_id=user.id,
        project_id=user.project_id,
        kind=order.kind,
        model_id=resolved.model.id,
        dataset_id=dataset.id,
        spec=frozen,
    )
    session.add(evaluation)
    session.flush()
    queue.enqueue(session, queue.EVALUATE, evaluation.id)
    session.refresh(evaluation)
    return evaluation


def find_dataset(session: Session, user: User, dataset_id: str | None, file: str | None, param: str = "file") -> Dataset:
    """A dataset by `ds-…`, or by its file. Raises NotFound, or BadField when neither is named."""
    if dataset_id:
        return datasets.get(session, user, ids.parse(ids.DATASET, dataset_id, param="dataset_id"))
    if file:
        return datasets.for_file(session, user, ids.parse(ids.FILE, file, param=param))
    hint = gettext("Send dataset_id or %(field)s.", field=param)
    raise BadField(gettext("No data was named."), hint=hint, param="dataset_id", code="missing_required_parameter")


def _spec(session: Session, order: EvaluationRequest, resolved: models.Resolved, dataset: Dataset) -> EvaluationSpec:
    if dataset.status != "ready" or not dataset.good_rows:
        raise Conflict(
            gettext(
                "The dataset %(name)s cannot be evaluated on: it is %(status)s and has %(rows)s valid rows.",
                name=dataset.name,
                status=gettext(dataset.status),
                rows=dataset.good_rows or 0,
            ),
            hint=gettext("Wait until it has been read, or fix the issues of its report."),
            param="dataset_id",
        )
    task = dataset.task or DEFAULT
    job, base = models.origin(session, resolved)
    suited.check(resolved, dataset, order.kind, job)
    trained_on = job is not None and job.dataset_id in datasets.family(session, dataset)
    run = job.spec["run"] if job and trained_on else {}
    shared = trained_on and job is not None and job.spec.get("validation") is None and run.get("validation_fraction", 0) > 0
    part = order.part or ("validation" if order.kind == "advice" or shared else "all")
    if order.points and order.kind != "blend":
        raise BadField(gettext("points are those of a blend."), hint=gettext('Remove them, or set kind to "blend".'), param="points")
    own_seed = {"seed": order.seed} if order.seed not in (None, run.get("seed")) else {}
    return EvaluationSpec(
        kind=order.kind,
        points=tuple(sorted({0.0, *order.points, 1.0})) if order.points else interpolation.POINTS,
        task=task,
        model=resolved.ref,
        base=models.reference(session, base) if base is not None and order.kind != "advice" else None,
        dataset=datasets.reference(dataset),
        rows=order.rows or ROWS[order.kind],
        part=part,
        validation_fraction=order.validation_fraction or run.get("validation_fraction") or held_out_share(dataset.good_rows),
        split=Split.model_validate(job.spec["split"] | own_seed) if trained_on and job is not None and job.spec.get("split") else None,
        max_length=order.max_length,
        answers=order.answers,
        answer_tokens=order.answer_tokens,
        forgetting=order.forgetting and base is not None,
        seed=order.seed if order.seed is not None else run.get("seed", 42),
        note=_note(shared, part, order, run, same=job is not None and job.dataset_id == dataset.id) if trained_on else "",
    )


def _note(shared: bool, part: Part, order: EvaluationRequest, run: Mapping[str, Any], *, same: bool) -> str:
    """A note for readers of the scores about rows that the model may have been trained on."""
    own_split = order.seed in (None, run.get("seed")) and order.validation_fraction in (None, run.get("validation_fraction"))
    if part == "all" or not shared or not own_split:
        return TRAINED_ON
    return "" if same else OTHER_VERSION


LAST_PAIRS = 50  # of the last jobs, and of the last evaluations, a form looks at these for a pair to begin with


def usual_pair(
    session: Session, user: User, models: Sequence[Model], datasets: Sequence[Dataset], model: Model | None, dataset: Dataset | None
) -> tuple[Model, Dataset] | None:
    """What a form begins with: the last pair trained or scored that can be scored, else the first that can; what is given stays."""
    usable = {m.id: m for m in ([model] if model else [m for m in models if m.kept])}
    rows = {d.id: d for d in ([dataset] if dataset else datasets)}
    jobs = select(Job.id, Job.created_at, Job.dataset_id).where(Job.project_id == user.project_id, Job.status == "succeeded")
    ended = jobs.order_by(Job.created_at.desc()).limit(LAST_PAIRS).subquery()
    trained = select(ended.c.created_at, Model.id, ended.c.dataset_id).join(Model, Model.job_id == ended.c.id)
    scored = mine(user).with_only_columns(Evaluation.created_at, Evaluation.model_id, Evaluation.dataset_id)
    scored = scored.order_by(Evaluation.created_at.desc()).limit(LAST_PAIRS)
    last = sorted((*session.execute(trained), *session.execute(scored)), key=lambda row: row[0], reverse=True)
    recent = [(usable[m], rows[d]) for _, m, d in last if m in usable and d in rows]
    pairs = itertools.chain(recent, itertools.product(usable.values(), rows.values()))
    return next(((m, d) for m, d in pairs if m.shape and suited.unfit(m.name, m.shape["architecture"], m.labels, d) is None), None)


# Looking ------------------------------------------------------------------------------------------------------------


def mine(user: User, kinds: Sequence[Kind] = SCORING) -> Select[Evaluation]:
    return ownership.mine(Evaluation, user, Evaluation.kind.in_(kinds))


def get(session: Session, user: User, evaluation_id: uuid.UUID, kinds: Sequence[Kind] = SCORING) -> Evaluation:
    """One's own. Raises NotFound, also for another person's."""
    return owned(session, Evaluation, user, evaluation_id, Evaluation.kind.in_(kinds))


def list_(session: Session, user: User, *, model_id: uuid.UUID | None = None, limit: int = 50) -> list[Evaluation]:
    """Newest first."""
    query = mine(user).order_by(Evaluation.created_at.desc(), Evaluation.id.desc()).limit(limit)
    return list(session.scalars(query if model_id is None else query.where(Evaluation.model_id == model_id)))


def latest(session: Session, user: User, model_id: uuid.UUID, kind: Kind, dataset_id: uuid.UUID | None = None) -> Evaluation | None:
    """The newest evaluation of this kind, preferring one that is queued, running or succeeded to a failed one."""
    query = mine(user).where(Evaluation.model_id == model_id, Evaluation.kind == kind, Evaluation.status != "cancelled")
    if dataset_id is not None:
        query = query.where(Evaluation.dataset_id == dataset_id)
    found = session.scalars(query.order_by(Evaluation.created_at.desc()).limit(10)).all()
    return next((e for e in found if e.status != "failed"), found[0] if found else None)


def cancel(session: Session, user: User, evaluation_id: uuid.UUID, kinds: Sequence[Kind] = SCORING) -> Evaluation:
    """Cancel one that is queued or running: its worker notices at the next heartbeat. One that has ended is unchanged."""
    get(session, user, evaluation_id, kinds)
    session.execute(
        update(Evaluation)
        .where(Evaluation.id == evaluation_id, Evaluation.status.in_(OPEN))
        .values(status="cancelled", lease_until=None, finished_at=now())
    )
    return get(session, user, evaluation_id, kinds)


def delete(session: Session, user: User, evaluation_id: uuid.UUID, kinds: Sequence[Kind] = SCORING) -> None:
    """Delete it; a running one is stopped."""
    cancel(session, user, evaluation_id, kinds).deleted_at = session.scalar(select(now()))
    session.flush()


def to_json(evaluation: Evaluation) -> JSON:
    """The evaluation as the API returns it."""
    spec = evaluation.spec
    return {
        "id": ids.public(ids.EVALUATION, evaluation.id),
        "object": "evaluation",
        "kind": evaluation.kind,
        "status": evaluation.status,
        "model": spec["model"]["name"],
        "base": (spec.get("base") or {}).get("name"),
        "dataset_id": ids.public(ids.DATASET, evaluation.dataset_id) if evaluation.dataset_id else None,
        "dataset": spec["dataset"]["name"],
        "task": spec["task"],
        "part": spec["part"],
        "rows": spec["rows"],
        "seed": spec["seed"],
        "note": spec.get("note", ""),
        "progress": evaluation.progress,
        "stage": evaluation.stage,
        "result": evaluation.result,
        "error": problem_json(evaluation.error),
        "created_at": int(evaluation.created_at.timestamp()),
        "finished_at": int(evaluation.finished_at.timestamp()) if evaluation.finished_at else None,
    }


# Who runs it --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EvaluationClaim:
    """The right to run an evaluation, for as long as nobody holds a higher fence."""

    id: uuid.UUID
    fence: int
    deaths: int
    spec: EvaluationSpec
    owner: uuid.UUID


def _died(session: Session, evaluation: Evaluation, how: str) -> None:
    _again(session, evaluation, f"Its worker {how}")


BESIDE_TRAINING: tuple[Kind, ...] = ("predictions", "vectors")
"""Kinds that the generate worker runs, one at a time, so that they do not wait for hours behind a job that trains."""


def _work(task: str, due: ColumnElement[bool]) -> leases.Work[Evaluation]:
    return leases.Work(Evaluation, task, waits_as="queued", runs_as="running", since=Evaluation.created_at, on_death=_died, due=due)


WORK = _work(queue.EVALUATE, Evaluation.kind.not_in(BESIDE_TRAINING))
PREDICTIONS = _work(queue.PREDICT, Evaluation.kind.in_(BESIDE_TRAINING))


def work_of(kind: str) -> leases.Work[Evaluation]:
    return PREDICTIONS if kind in BESIDE_TRAINING else WORK


def waiting(session: Session, evaluation_id: uuid.UUID) -> EvaluationSpec | None:
    """What is to be done; None when it does not wait any more."""
    found = session.scalar(select(Evaluation.spec).where(Evaluation.id == evaluation_id, WORK.free() | PREDICTIONS.free()))
    return None if found is None else EvaluationSpec.model_validate(found)


def claim(session: Session, evaluation_id: uuid.UUID, gpus: int = 0) -> EvaluationClaim | None:
    """Claim a queued one, or one whose worker stopped sending heartbeats. None: there is nothing to do, drop the message."""
    kind = session.scalar(select(Evaluation.kind).where(Evaluation.id == evaluation_id))
    found = leases.claim(session, work_of(kind or ""), evaluation_id, progress=0.0, stage=None)
    if found is None:
        return None
    usage.hold_gpus(session, found.id, found.fence, gpus)
    return EvaluationClaim(found.id, found.fence, found.deaths, EvaluationSpec.model_validate(found.spec), found.owner_id)


def heartbeat(session: Session, held: EvaluationClaim, progress: float, stage: str | None) -> bool:
    """Renew the lease; False when it is lost: taken over, cancelled or deleted."""
    return leases.heartbeat(session, WORK, held.id, held.fence, progress=progress, stage=storable(stage))


def finish(
    session: Session, held: EvaluationClaim, *, result: JSON | None = None, error: JSON | None = None, output_bytes: int = 0
) -> bool:
    """Record how it ended, and the size of the file that it left; False when the lease is lost."""
    values = {
        "status": "failed" if error else "succeeded",
        "result": storable(result, words=True),
        "error": storable(error),
        "output_bytes": output_bytes,
        "progress": 1.0,
        "stage": None,
        "finished_at": now(),
    }
    return leases.finish_if_held(session, WORK, held.id, held.fence, **values)


def release(session: Session, held: EvaluationClaim, reason: str = "") -> None:
    """Requeue it: with a `reason` its process died, without one its worker is shutting down."""
    found = leases.lock_if_held(session, WORK, held.id, held.fence)
    if found is not None:
        _again(session, found, reason)


def _again(session: Session, evaluation: Evaluation, reason: str) -> None:
    """Requeue it, or fail it at the maximum of deaths. The caller holds its row."""
    evaluation.stage = None
    if leases.requeue(session, work_of(evaluation.kind), evaluation, died=bool(reason)):
        return
    evaluation.status = "failed"
    evaluation.finished_at = session.scalar(select(now()))
    hint = "Look at the worker's log; fewer rows or a smaller model may help."
    evaluation.error = storable({"code": "crashed", "message": f"{reason} That was death {evaluation.deaths}.", "hint": hint})


def reap(session: Session) -> dict[str, int]:
    """The relay's round. A generate worker takes the messages of predictions at once and runs one at a time, so those that wait in it
    do not show in its queue: they are its backlog while one runs."""
    held = session.scalar(select(func.count()).where(PREDICTIONS.taken(), PREDICTIONS.due))
    found = leases.reap(session, WORK)
    return found | {"announced": found["announced"] + leases.redeliver(session, PREDICTIONS, backlog=held or None)}
