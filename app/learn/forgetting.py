"""Forgetting and the blend: a model is trained on clinical notes, and measured on notes and on general text."""

from __future__ import annotations

import uuid
from typing import Any, ClassVar

from sqlalchemy.orm import Session

from app.datasets import samples
from app.errors import Conflict
from app.evaluation import service as evaluations
from app.kit import ids
from app.kit.humanize import human_number
from app.languages import gettext, mark
from app.learn import _visits
from app.learn._base import Need, StartedStop, Stop, StopButton, StopResult, StopTable, Typed
from app.learn._jobs import doing, fault_of, job_of, moving, order_job, path_of, share_done
from app.metrics import ability
from app.models import interpolation
from app.ownership import mine
from app.tables import Evaluation, Job, Model, StopVisit, User

RUN: dict[str, Any] = {
    "max_steps": 4, "max_tokens_per_step": 256, "epochs": 100, "learning_rate": 8e-4, "validation_fraction": 0.1, "samples": 0,
    "row_losses": False, "eval_steps": 4, "early_stopping_patience": 0, "load_best": False, "optimizer": "adafactor",
}  # fmt: skip
"""AdamW's two moments would be two thirds of a checkpoint of 1.6 GB, and saving it a quarter of the run; this rate shows forgetting."""
BLEND: dict[str, Any] = {"kind": "blend", "rows": 6, "points": [0.5]}


class ForgettingStop(Stop):
    name: ClassVar = "forgetting"
    title: ClassVar = mark("Forgetting, and the blend")
    place: ClassVar = 105
    idea: ClassVar = mark(
        "Fine-tuning gives a model the language of a domain, such as medical notes. Changing all weights costs most, and the model may "
        "forget what it could do before."
    )
    do: ClassVar = mark(
        "All weights of a model are trained on invented clinical notes, and its loss is measured on notes and on general text, before and "
        "after. Then the result is blended half and half with its base."
    )
    words: ClassVar = ("Forgetting", "Fine-tuning", "Validation set", "Perplexity", "Learning rate", "Bits per byte")
    needs: ClassVar[tuple[Need, ...]] = ("writes",)
    samples: ClassVar = ("clinical-notes",)
    part: ClassVar = "learn/forgetting.html"

    def buttons(self, session: Session, user: User, visit: StopVisit | None) -> list[StopButton]:
        ready = visit is not None and _tuned(session, user, visit.refs["job"]) is not None
        return [
            StopButton("", gettext("1. Train on the notes")),
            StopButton("blend", gettext("2. Blend it with its base"), "" if ready else gettext("as soon as the model is trained.")),
        ]

    def begin(self, session: Session, user: User, typed: Typed, visit: StopVisit | None) -> StartedStop:
        if typed.get("do") != "blend":
            model, dataset = _visits.take_model(session, user, "writes"), samples.add(session, user, self.samples[0])
            return StartedStop({"job": str(order_job(session, user, self, model, dataset, {"name": "full"}, RUN).id)})
        tuned = _tuned(session, user, visit.refs["job"]) if visit else None
        if visit is None or tuned is None:
            raise Conflict(gettext("There is no trained model yet."), hint=gettext("Train it on the notes first, and wait for its end."))
        dataset = samples.add(session, user, self.samples[0])
        request = {"model": tuned.name, "dataset_id": ids.public(ids.DATASET, dataset.id), **BLEND}
        made = evaluations.create(session, user, evaluations.read_order(request))
        return StartedStop({"job": visit.refs["job"], "blend": str(made.id)})

    def look(self, session: Session, user: User, visit: StopVisit) -> StopResult:
        job = job_of(session, user, visit.refs["job"])
        if job is None:
            return StopResult(fault=gettext("The run was deleted."))
        result = StopResult(
            fault=fault_of(job),
            links=[(gettext("The run on clinical notes"), path_of(job))],
            more={"curve": None, "model": "", "base": ""},
        )
        if moving(job):
            result.doing, result.progress = doing(job), share_done(job)
            return result
        if result.fault:
            return result
        result.tables = [_before_and_after(job)]
        result.headline = _headline(job)
        if "blend" not in visit.refs:
            result.notes.append(gettext("Now blend it: the second button tries the weights halfway between the base and the result."))
            return result
        _show_blend(session, user, visit.refs["blend"], result)
        return result


def _tuned(session: Session, user: User, key: str) -> Model | None:
    return session.scalar(mine(Model, user).where(Model.job_id == uuid.UUID(key), Model.status == "ready"))


def _losses(job: Job) -> tuple[float | None, float | None]:
    told = job.evaluation or {}
    return (told.get("base") or {}).get("loss"), (told.get("tuned") or {}).get("loss")


def _headline(job: Job) -> str:
    base, tuned = _losses(job)
    general = (job.forgetting or {}).get("change")
    losses = {"before": human_number(base, 2), "after": human_number(tuned, 2)}
    if general is None:
        return gettext("Notes: loss %(before)s → %(after)s; general ability not measured", **losses)
    return gettext("Notes: loss %(before)s → %(after)s; general ability %(change)s", change=ability(general), **losses)


def _before_and_after(job: Job) -> StopTable:
    base, tuned = _losses(job)
    told = job.forgetting or {}
    rows = [[gettext("Clinical notes, loss in nats per token"), human_number(base, 3), human_number(tuned, 3)]]
    if told.get("change") is not None:
        rows.append([gettext("General text, bits per byte"), human_number(told.get("before"), 3), human_number(told.get("after"), 3)])
    return StopTable(gettext("Own text and general text"), (gettext("Text"), gettext("Before"), gettext("After")), rows, (1, 2))


def _show_blend(session: Session, user: User, key: str, result: StopResult) -> None:
    found = session.scalar(mine(Evaluation, user).where(Evaluation.id == uuid.UUID(key)))
    if found is None or found.status in ("failed", "cancelled"):
        result.fault = ((found.error or {}).get("message") if found else None) or gettext("The blend was cancelled or deleted.")
    elif found.status != "succeeded":
        result.doing, result.progress = gettext(found.stage or "") or gettext("Waiting for a worker"), found.progress
    else:
        result.ended = True
        spec = found.spec
        result.more = {"curve": interpolation.curve(found.result), "model": spec["model"]["name"], "base": spec["base"]["name"]}
        result.links.append((gettext("The blend"), f"/evaluations/{ids.public(ids.EVALUATION, found.id)}"))
