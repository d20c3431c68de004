"""Pre-training seen: a model learns to spell from nothing, then it is fine-tuned, next to the same model without pre-training."""

from __future__ import annotations

from typing import Any, ClassVar

from sqlalchemy.orm import Session

from app.datasets import samples
from app.errors import Conflict
from app.kit.humanize import human_count, human_number
from app.languages import gettext, mark, ngettext
from app.learn import _events, _text
from app.learn._base import StartedStop, Stop, StopButton, StopResult, StopText, Typed
from app.learn._jobs import doing, fault_of, job_of, moving, order_job, path_of, share_done
from app.models import from_nothing
from app.models.from_nothing import BlankSize
from app.ownership import mine
from app.shapes import Shape
from app.tables import Dataset, Job, Model, StopVisit, User

SIZE = BlankSize(128, 4)
RUN: dict[str, Any] = {
    "max_tokens_per_step": 1024, "max_length": 256, "epochs": 1000, "samples": 1, "sample_tokens": 60, "forgetting": False, "row_losses": False,
    "early_stopping_patience": 0, "schedule": "cosine", "warmup_fraction": 0.05,
}  # fmt: skip
FROM_NOTHING = RUN | {"max_steps": 160, "eval_steps": 16, "learning_rate": 3e-3, "validation_fraction": 0.05}
TUNED = RUN | {"max_steps": 20, "eval_steps": 4, "learning_rate": 1e-3, "validation_fraction": 0.2}

TITLES = {"first": mark("The pre-training"), "tuned": mark("Fine-tuned after it"), "twin": mark("The twin without it")}


class PreTrainingStop(Stop):
    name: ClassVar = "pre-training"
    title: ClassVar = mark("Pre-training, seen")
    place: ClassVar = 30
    idea: ClassVar = mark(
        "Pre-training gives general ability, fine-tuning a special one: a child can walk and run before it trains for athletics. "
        "Transfer learning is faster and needs less data, because what was learned before is kept."
    )
    do: ClassVar = mark(
        "A model of about a million random parameters reads letters until it can spell, while you watch. Then it is fine-tuned on another "
        "text, next to the same model that was never pre-trained."
    )
    words: ClassVar = ("Pre-training", "Transfer learning", "Parameter", "Hyperparameter", "Loss", "Epoch", "Learning rate")

    def datasets(self, session: Session, user: User) -> list[Dataset]:
        return [_text.dataset(session, user), samples.add(session, user, "workshop-notes")]

    def buttons(self, session: Session, user: User, visit: StopVisit | None) -> list[StopButton]:
        first = StopButton("", gettext("1. Pre-train from nothing"))
        ready = visit is not None and _trained(session, user, visit.refs["first"]) is not None
        return [first, StopButton("tune", gettext("2. Fine-tune both"), "" if ready else gettext("as soon as the model is pre-trained."))]

    def begin(self, session: Session, user: User, typed: Typed, visit: StopVisit | None) -> StartedStop:
        blank = from_nothing.ensure(session, user, SIZE)
        general, own = self.datasets(session, user)
        if typed.get("do") != "tune":
            job = order_job(session, user, self, blank, general, {"name": "full"}, FROM_NOTHING, title="from nothing")
            return StartedStop({"first": str(job.id)})
        trained = _trained(session, user, visit.refs["first"]) if visit else None
        if visit is None or trained is None:
            raise Conflict(gettext("There is no pre-trained model yet."), hint=gettext("Pre-train one first, and wait for its end."))
        tuned = order_job(session, user, self, trained, own, {"name": "full"}, TUNED, title="pre-trained, then fine-tuned")
        twin = order_job(session, user, self, blank, own, {"name": "full"}, TUNED, title="the same without pre-training")
        return StartedStop({"first": visit.refs["first"], "tuned": str(tuned.id), "twin": str(twin.id)})

    def look(self, session: Session, user: User, visit: StopVisit) -> StopResult:
        found = {name: job_of(session, user, visit.refs[name]) for name in TITLES if name in visit.refs}
        jobs = {name: job for name, job in found.items() if job is not None}
        if len(jobs) < len(found):
            return StopResult(fault=gettext("A run of this result was deleted."))
        result = StopResult(
            fault=next(filter(None, map(fault_of, jobs.values())), ""), links=[(gettext(TITLES[n]), path_of(j)) for n, j in jobs.items()]
        )
        current = next((job for job in jobs.values() if moving(job)), None)
        if current is not None:
            result.doing = doing(current)
            result.progress = sum(map(share_done, jobs.values())) / len(jobs)
        _show_spelling(session, jobs["first"], result)
        if "twin" in jobs:
            _show_twins(session, jobs["tuned"], jobs["twin"], result)
        elif not current and not result.fault:
            result.notes.append(gettext("Now fine-tune it: press the second button."))
        result.ended = not current and not result.fault and "twin" in jobs
        return result


def _trained(session: Session, user: User, job: str) -> Model | None:
    found = job_of(session, user, job)
    return session.scalar(mine(Model, user).where(Model.job_id == found.id, Model.status == "ready")) if found else None


def _show_spelling(session: Session, job: Job, result: StopResult) -> None:
    """What it wrote on the way, and its loss."""
    texts = _events.written(session, job)
    shown = [texts[place] for place in sorted({0, len(texts) // 4, len(texts) // 2, len(texts) - 1})] if texts else []
    size = human_count(Shape.model_validate(job.spec["model"]["shape"]).parameters())
    result.texts = [
        StopText(
            ngettext("After %(num)s steps", "After %(num)s steps", step),
            text,
            prompt,
            None,
            path_of(job),
            gettext("by %(size)s parameters, letter by letter", size=size),
        )
        for step, prompt, text in shown
    ]
    result.curves = _events.loss_curve(gettext("Learning to spell"), {gettext("pre-training"): _events.validation_losses(session, job)})


def _show_twins(session: Session, tuned: Job, twin: Job, result: StopResult) -> None:
    """The two fine-tunings on the same rows with the same settings."""
    lines = {
        gettext("pre-trained first"): _events.validation_losses(session, tuned),
        gettext("from random weights"): _events.validation_losses(session, twin),
    }
    result.curves += _events.loss_curve(
        gettext("Fine-tuning the same shape on the same rows"), {name: points for name, points in lines.items() if points}
    )
    if all(lines.values()):
        tuned_end, twin_end = (human_number(min(loss for _, loss in points), 2) for points in lines.values())
        ends = {"tuned": tuned_end, "twin": twin_end}
        result.headline = gettext("Loss on new text: %(tuned)s after pre-training, %(twin)s without", **ends)
        result.notes.append(
            gettext(
                "With the same rows, steps and settings the pre-trained one ends at %(tuned)s nats per letter, its twin at %(twin)s.",
                **ends,
            )
        )
