"""The tutorial from a generic model through an instruction-tuned one to a dialogue model, one button per step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import urlencode

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.datasets import samples
from app.errors import Conflict
from app.jobs import request as job_request
from app.jobs import service as jobs
from app.kit import ids
from app.languages import gettext
from app.models import from_nothing
from app.models import imports as model_imports
from app.models import service as models
from app.tables import Dataset, Job, Model, User

GENERIC, DIALOGUE = "gemma-3-270m", "smollm2-135m-instruct"
SAMPLE = "plain-explanations"
RECIPE = "three-kinds"
"""Metadata key of a job that this page created."""
PAGE = "/playground/tutorial"
QUESTION = "What is the capital of France?"
"""The first prompt for each model."""


class Action(NamedTuple):
    """A button. `post` says that it changes something; otherwise it is a link."""

    title: str
    path: str
    post: bool = False


@dataclass
class TutorialStep:
    """One kind of model: what it is, the model that shows it, its current state, and the next action."""

    title: str
    says: str
    shown: str
    missing: str
    model: Model | None = None
    doing: str = ""  # the current work, in words
    job: Job | None = None
    actions: list[Action] = field(default_factory=list)

    @property
    def predicted_seconds(self) -> float | None:
        return ((self.job.estimate or {}) if self.job else {}).get("seconds")

    @property
    def took_seconds(self) -> float | None:
        done = self.job if self.job and self.job.status == "succeeded" else None
        return (done.finished_at - done.started_at).total_seconds() if done and done.finished_at and done.started_at else None


def steps(session: Session, user: User) -> list[TutorialStep]:
    """The three steps in their current state."""
    every = models.offered(session, user)
    ready = [m for m in every if m.status == "ready"]
    coming = {m.name for m in every if m.status == "fetching"}
    generic = _of_kind(ready, "generic", GENERIC)
    dialogue = _of_kind(ready, "dialogue", DIALOGUE)
    return [
        _starter(
            TutorialStep(
                gettext("Base (generic): it continues a text"),
                gettext(
                    "Pretrained on much text for one task: predict the next token. A question may be answered, or followed by three more "
                    "questions. Its prompt is the text itself."
                ),
                QUESTION,
                gettext("Add %(model)s; its terms must be accepted first.", model=GENERIC),
                generic,
            ),
            coming,
            GENERIC,
            Action(gettext("Read the terms and add it"), f"/models/terms/{GENERIC}?next={PAGE}"),
        ),
        _instruction(session, user, ready, generic),
        _starter(
            TutorialStep(
                gettext("Chat (dialogue-tuned): it holds a conversation"),
                gettext(
                    "Another model, fine-tuned on whole conversations: turns, roles and when to stop. Every earlier turn is part of its "
                    "prompt."
                ),
                f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n",
                gettext("Add the starter %(model)s.", model=DIALOGUE),
                dialogue,
            ),
            coming,
            DIALOGUE,
            Action(gettext("Add it"), f"{PAGE}/dialogue", post=True),
        ),
    ]


def _starter(step: TutorialStep, coming: set[str], name: str, add: Action) -> TutorialStep:
    if step.model:
        step.actions = [_ask(step.model)]
    elif name in coming:
        step.doing = gettext("%(model)s is being downloaded.", model=name)
    else:
        step.actions = [add]
    return step


def _instruction(session: Session, user: User, ready: list[Model], generic: Model | None) -> TutorialStep:
    """The second step: tried when its model is ready, followed while it trains, otherwise one button away."""
    tuned = next((m for m in reversed(ready) if m.kind == "instruction" and m.base_id is not None), None)
    step = TutorialStep(
        gettext("Instruct (instruction-tuned): it follows instructions"),
        gettext(
            "The base model of step 1, fine-tuned on instructions with their answers. The button adds the sample “Instructions: short "
            "explanations” and starts a LoRA run on it: a few minutes are enough to see it change."
        ),
        f"### User:\n{QUESTION}\n\n### Assistant:\n",
        gettext("Train it yourself, in a few minutes.") if generic else gettext("Add the base model first."),
        tuned or _of_kind(ready, "instruction", ""),
        job=_ordered(session, user),
    )
    if step.job and step.job.status in ("queued", "running"):
        step.doing = gettext("The run is queued.") if step.job.status == "queued" else gettext("The run is running.")
    if step.model:
        step.actions = [_ask(step.model)]
    elif step.job and step.job.status in ("queued", "running", "paused"):
        step.actions = [Action(gettext("Watch the run"), f"/jobs/{ids.public(ids.JOB, step.job.id)}")]
    elif generic:
        step.actions = [Action(gettext("Fine-tune it here"), f"{PAGE}/instruction", post=True)]
    return step


def _ask(model: Model) -> Action:
    return Action(gettext("Ask it"), f"/playground?{urlencode({'models': model.name, 'prompt': QUESTION})}")


def _ordered(session: Session, user: User) -> Job | None:
    """The newest job this page created."""
    query = select(Job).where(Job.project_id == user.project_id, Job.deleted_at.is_(None), Job.user_metadata["recipe"].astext == RECIPE)
    return session.scalars(query.order_by(Job.created_at.desc()).limit(1)).first()


def tune(session: Session, user: User) -> Job:
    """Start the second step: the sample as a dataset, unless it exists, and a LoRA job on the generic model.

    Raises Conflict while there is no generic model; a running job is returned as it is.
    """
    generic = _of_kind([m for m in models.offered(session, user) if m.status == "ready"], "generic", GENERIC)
    if generic is None:
        raise Conflict(gettext("There is no base model to fine-tune yet."), hint=gettext("Add %(model)s first.", model=GENERIC))
    earlier = _ordered(session, user)
    if earlier and earlier.status in ("queued", "running", "paused"):
        return earlier
    order = {
        "model": generic.name, "dataset_id": ids.public(ids.DATASET, _sample(session, user).id), "strategy": {"name": "lora"},
        "name": f"{generic.title}, instruction-tuned", "suffix": "instruction", "metadata": {"recipe": RECIPE},
    }  # fmt: skip
    return jobs.create(session, user, job_request.read_order(order))


def _sample(session: Session, user: User) -> Dataset:
    return samples.add(session, user, SAMPLE)


def add_dialogue(session: Session) -> Model:
    """Request the third step's starter model."""
    return model_imports.add_starter(session, DIALOGUE)


def _of_kind(ready: list[Model], kind: str, name: str) -> Model | None:
    """The tutorial's own model, or the first of the kind that was not fine-tuned here."""
    mine = [m for m in ready if m.kind == kind and not from_nothing.is_blank(m)]
    return next((m for m in mine if m.name == name), None) or next((m for m in mine if m.base_id is None), None)
