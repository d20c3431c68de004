"""Runs of distillation: a teacher answers the prompts of a dataset several times, and of each prompt's answers the best one is kept where its
score is high enough (rejection sampling). What is kept becomes a chat dataset, on which a student is fine-tuned as on any other.

    queued ──claim──▶ running ──finish──▶ succeeded (with a dataset)
      ▲                 │  ├────fail────▶ failed
      └──── expire ─────┘  └───cancel───▶ cancelled

Answers are stored prompt by prompt, so a run whose worker died resumes where it was.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from app import formats, graders, leases, limits, ownership, queue, saved_graders
from app.datasets import service as datasets
from app.errors import BadField, Conflict, problem_json
from app.inference import judges, playground
from app.inference.judges import ResolvedJudge
from app.inference.protocol import MAX_CHOICES, ExternalEngine
from app.jobs.request import bad_field
from app.kit import ids, stats
from app.kit.json_safe import storable
from app.languages import gettext, mark
from app.ownership import maker_of, owned
from app.spec import DatasetRef, ModelRef
from app.storage import files
from app.tables import JSON, Dataset, DistillationRun, DistilledRow, User

MAX_PROMPTS = 100_000


LABELS = (mark("Answers"), mark("Threshold"), mark("Allows training"))
"""Labels that forms make of the names of fields."""


class DistillationOrder(BaseModel):
    """What is asked of a teacher, and what is kept of its answers."""

    model_config = ConfigDict(extra="forbid")

    rows: int = Field(
        1000, ge=1, le=MAX_PROMPTS, description=mark("Prompts that are answered at most; a random sample where there are more.")
    )
    answers: int = Field(4, ge=1, le=MAX_CHOICES, description=mark("Answers to each prompt, of which the best is kept."))
    grader: str | dict[str, Any] | None = Field(
        None,
        description=mark("What scores the answers: a grader, or the id of a saved one. Without one there is one answer, which is kept."),
    )
    threshold: float = Field(0.5, ge=0, le=1, description=mark("Score from which the best answer to a prompt is kept."))
    temperature: float = Field(0.8, ge=0, le=2, description=mark("How varied the answers are."))
    max_tokens: int = Field(512, ge=1, le=32_768, description=mark("Maximum tokens of an answer; one that is cut off is not kept."))
    system: str = Field(
        "", max_length=20_000, description=mark("Instructions to the teacher alone, which are not in the rows of the dataset.")
    )
    seed: int = Field(42, ge=0, le=2**31 - 1, description=mark("Decides which prompts are sampled, and every random draw."))
    name: str | None = Field(None, max_length=200, description=mark("Name of the dataset."))
    license: str | None = Field(
        None,
        max_length=200,
        description=mark("License of the teacher, kept with the dataset. Without it, the one that its model is known by."),
    )
    allows_training: bool = Field(False, description=mark("That this license allows other models to be trained on the teacher's answers."))


class DistillationSpec(BaseModel):
    """The immutable spec of a run, everything that the worker gets."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    owner: uuid.UUID
    teacher: ModelRef
    engine: ExternalEngine | None = None
    license: str
    dataset: DatasetRef
    rows: int
    answers: int
    grader: dict[str, Any] | None = None
    judges: tuple[ResolvedJudge, ...] = ()
    threshold: float
    temperature: float
    max_tokens: int
    system: str
    seed: int
    name: str


def read_order(given: JSON) -> DistillationOrder:
    try:
        return DistillationOrder.model_validate(given)
    except ValidationError as error:
        raise bad_field(error) from None


def create(session: Session, user: User, model: str, dataset: Dataset, order: DistillationOrder) -> DistillationRun:
    """A queued run and its message. Raises NotFound, Conflict while either is not ready, BadField and LimitReached."""
    limits.check(session, user, "tokens_per_day")
    who, ref = playground.speaker(session, user, model), datasets.reference(dataset)
    if not formats.asks(ref.format):
        raise BadField(
            gettext("The rows of %(name)s have no prompts.", name=dataset.name),
            hint=gettext("Take a dataset of conversations, instructions, completions or preferences."),
            param="dataset_id",
        )
    license_ = _license(order, who.resolved.model.license, model)
    if order.grader is None and order.answers != 1:
        said = gettext("Without a grader no answer is the best of several.")
        raise BadField(said, hint=gettext("Send a grader, or answers: 1."), param="answers")
    graded = saved_graders.named(session, user, [order.grader], "grader") if order.grader else []
    spec = DistillationSpec(
        owner=user.id, teacher=who.ref, engine=who.engine, license=license_, dataset=ref, rows=min(order.rows, ref.rows), answers=order.answers,
        grader=graders.to_json(graded[0]) if graded else None, judges=judges.resolve(session, user, graded), threshold=order.threshold,
        temperature=order.temperature, max_tokens=order.max_tokens, system=order.system, seed=order.seed,
        name=(order.name or f"{dataset.name}, answered by {who.ref.name}")[:200],
    )  # fmt: skip
    run = DistillationRun(
        id=uuid.uuid4(), owner_id=user.id, project_id=user.project_id, model_id=who.resolved.model.id, dataset_id=dataset.id,
        spec=storable(spec.model_dump(mode="json")),
    )  # fmt: skip
    session.add(run)
    session.flush()
    queue.enqueue(session, queue.DISTILL, run.id)
    session.refresh(run)
    return run


def _license(order: DistillationOrder, known: str | None, model: str) -> str:
    """The license that is kept. Raises BadField where none is known, or its permission was not confirmed."""
    found = (order.license or known or "").strip()
    if not found:
        said = gettext("The license of %(model)s is not known here.", model=model)
        raise BadField(said, hint=gettext("Send license: the terms of its answers."), param="license")
    if not order.allows_training:
        raise BadField(
            gettext(
                "Some licenses forbid to train other models on a model's answers, and %(model)s has the license %(license)s.",
                model=model,
                license=found,
            ),
            hint=gettext("Read it, and send allows_training: true where it allows that."),
            param="allows_training",
            code="license_not_confirmed",
        )
    return found


# Looking ------------------------------------------------------------------------------------------------------------


def mine(user: User) -> Select[DistillationRun]:
    return ownership.mine(DistillationRun, user)


def list_(session: Session, user: User, limit: int = 100) -> list[DistillationRun]:
    """Newest first."""
    return list(session.scalars(mine(user).order_by(DistillationRun.created_at.desc(), DistillationRun.id).limit(limit)))


def get(session: Session, user: User, run_id: uuid.UUID) -> DistillationRun:
    return owned(session, DistillationRun, user, run_id)


def rows(session: Session, run: DistillationRun, after: int = 0, limit: int = 50) -> list[DistilledRow]:
    """Answered prompts in the order of the dataset, starting after line `after`."""
    query = select(DistilledRow).where(DistilledRow.run_id == run.id, DistilledRow.line > after).order_by(DistilledRow.line).limit(limit)
    return list(session.scalars(query))


def to_json(run: DistillationRun) -> JSON:
    spec = run.spec
    named = ("license", "rows", "answers", "grader", "threshold", "temperature", "max_tokens", "system", "seed", "name")
    return {
        "id": ids.public(ids.DISTILLATION, run.id),
        "object": "distillation",
        "status": run.status,
        "teacher": spec["teacher"]["name"],
        "revision": spec["teacher"]["revision"],
        "dataset_id": ids.public(ids.DATASET, run.dataset_id),
        **{name: spec[name] for name in named},
        "result_dataset_id": ids.public(ids.DATASET, run.made_id) if run.made_id else None,
        "progress": run.progress,
        "result": run.result,
        "error": problem_json(run.error),
        "created_at": int(run.created_at.timestamp()),
        "finished_at": int(run.finished_at.timestamp()) if run.finished_at else None,
    }


def row_json(row: DistilledRow) -> JSON:
    return {name: getattr(row, name) for name in ("line", "messages", "answers", "best")}


def cancel(session: Session, run: DistillationRun) -> DistillationRun:
    """Cancel a run; its answers are kept and become no dataset. One that has ended is unchanged."""
    session.refresh(run, with_for_update=True)
    if run.status in ("queued", "running"):
        run.status, run.lease_until, run.finished_at = "cancelled", None, func.clock_timestamp()
        session.flush()
    session.refresh(run)
    return run


def resume(session: Session, user: User, run: DistillationRun) -> DistillationRun:
    """Queue a failed or cancelled run again, which goes on behind the prompts that are answered. Raises Conflict, LimitReached."""
    session.refresh(run, with_for_update=True)
    if run.status not in ("failed", "cancelled"):
        said = gettext("The run is %(status)s.", status=gettext(run.status))
        raise Conflict(said, hint=gettext("One that failed or was cancelled can be resumed."))
    limits.check(session, user, "tokens_per_day")
    run.status, run.error, run.finished_at, run.deaths = "queued", None, None, 0
    session.flush()
    queue.enqueue(session, queue.DISTILL, run.id)
    session.refresh(run)
    return run


def delete(session: Session, run: DistillationRun) -> None:
    """Delete a run; its dataset stays. Raises Conflict while it has not ended."""
    if run.status in ("queued", "running"):
        raise Conflict(gettext("The run has not ended."), hint=gettext("Cancel it first."))
    run.deleted_at = func.clock_timestamp()
    session.flush()


# Who runs it --------------------------------------------------------------------------------------------------------


def _died(session: Session, run: DistillationRun, how: str) -> None:
    """Requeue a run whose worker died, or fail it when its workers die without a prompt answered between them."""
    if leases.requeue(session, WORK, run, died=True):
        return
    run.status, run.finished_at = "failed", session.scalar(select(leases.now()))
    message = f"Its worker {how} That was death {run.deaths} without a prompt answered between."
    run.error = {"code": "crashed", "message": message, "hint": "Take a smaller teacher, or fewer answers."}


WORK = leases.Work(DistillationRun, queue.DISTILL, waits_as="queued", runs_as="running", since=DistillationRun.created_at, on_death=_died)


def claim(session: Session, run_id: uuid.UUID) -> tuple[int, DistillationSpec, set[int], JSON] | None:
    """The fence, the spec, the lines that are answered already and their totals; None when there is nothing to do or another worker holds
    it."""
    run = leases.claim(session, WORK, run_id)
    if run is None:
        return None
    done = set(session.scalars(select(DistilledRow.line).where(DistilledRow.run_id == run_id)))
    return run.fence, DistillationSpec.model_validate(run.spec), done, run.result or {}


def heartbeat(session: Session, run_id: uuid.UUID, fence: int, progress: float, answered: Sequence[JSON], totals: JSON) -> bool:
    """Renew the lease, and store the prompts answered since the last heartbeat; False when the lease is lost or the run was cancelled. An
    answered prompt resets the count of deaths."""
    forgiven = {"deaths": 0} if answered else {}
    if not leases.heartbeat(session, WORK, run_id, fence, progress=progress, result=storable(totals), **forgiven):
        return False
    session.add_all([DistilledRow(run_id=run_id, **storable(row)) for row in answered])
    session.flush()
    return True


def fail(session: Session, run_id: uuid.UUID, fence: int, error: JSON, totals: JSON) -> bool:
    """Record that it failed; False when the lease is lost."""
    values = {"status": "failed", "error": storable(error), "result": storable(totals), "finished_at": leases.now()}
    return leases.finish_if_held(session, WORK, run_id, fence, **values)


def finish(session: Session, run_id: uuid.UUID, fence: int, totals: JSON) -> bool:
    """Make the dataset of the kept answers and record that the run succeeded, in one transaction; False when the lease is lost. A run that
    keeps nothing ends as failed, with the reason."""
    run = leases.lock_if_held(session, WORK, run_id, fence)
    if run is None:
        return False
    spec, found = DistillationSpec.model_validate(run.spec), summary(session, run_id) | totals
    if not found["kept"]:
        best = found["best_score"]
        reached = f"the best answer has {best:.2f}" if best is not None else "no answer could be graded"
        message = f"None of the answers to {found['prompts']} prompts reached {spec.threshold:g}: {reached}."
        error = {"code": "nothing_kept", "message": message, "hint": "Lower threshold, ask for more answers, or take a stronger teacher."}
        return fail(session, run_id, fence, error, found)
    run.made_id = _dataset(session, run, spec, found).id
    run.status, run.lease_until, run.progress, run.result = "succeeded", None, 1.0, storable(found)
    run.finished_at = session.scalar(select(leases.now()))
    session.flush()
    return True


def summary(session: Session, run_id: uuid.UUID) -> JSON:
    """How many prompts were answered and kept, the share with its 95% interval, and the mean of the best scores."""
    every = list(session.execute(select(DistilledRow.best, DistilledRow.answers).where(DistilledRow.run_id == run_id)))
    kept = sum(best is not None for best, _ in every)
    scores = [[one["score"] for one in answers if one["score"] is not None] for _, answers in every]
    best = [max(some) for some in scores if some]
    return {
        "prompts": len(every),
        "kept": kept,
        "share": kept / len(every) if every else None,
        "interval": list(stats.wilson(kept, len(every))) if every else None,
        "mean_score": sum(map(sum, scores)) / max(sum(map(len, scores)), 1) if best else None,
        "mean_best": sum(best) / len(best) if best else None,
        "best_score": max(best, default=None),
    }


def _dataset(session: Session, run: DistillationRun, spec: DistillationSpec, found: JSON) -> Dataset:
    """The dataset of the kept answers, which says where they come from."""
    user = maker_of(session, run)
    data = "\n".join(_lines(session, run.id, spec)).encode()
    file = files.add_bytes(session, user, data, "distilled.jsonl", "fine-tune")
    made = datasets.create(session, user, file, name=spec.name, format="chat")
    made.origin = storable({
        "operation": "distillation", "run": ids.public(ids.DISTILLATION, run.id), "from": ids.public(ids.DATASET, run.dataset_id),
        "teacher": spec.teacher.name, "revision": spec.teacher.revision, "license": spec.license,
        "grader": (spec.grader or {}).get("name"), "threshold": spec.threshold if spec.grader else None, "answers": spec.answers,
        "prompts": found["prompts"], "kept": found["kept"],
    })  # fmt: skip
    session.flush()
    return made


def _lines(session: Session, run_id: uuid.UUID, spec: DistillationSpec) -> Iterator[str]:
    query = select(DistilledRow).where(DistilledRow.run_id == run_id, DistilledRow.best.is_not(None)).order_by(DistilledRow.line)
    for row in session.scalars(query.execution_options(yield_per=500)):
        answer = row.answers[row.best or 0]
        messages = row.messages[1:] if spec.system else row.messages  # the instructions were to the teacher alone
        more = {"source_line": row.line, **({"score": answer["score"]} if answer["score"] is not None else {})}
        yield json.dumps({"messages": [*messages, {"role": "assistant", "content": answer["text"]}], **more}, ensure_ascii=False)


def reap(session: Session) -> dict[str, int]:
    """One round of the reaper."""
    return leases.reap(session, WORK)


Status = Literal["queued", "running", "succeeded", "failed", "cancelled"]
