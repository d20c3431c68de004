"""The recipe that takes a newcomer from a generic model over an instruction-tuned one to a dialogue model."""

from __future__ import annotations

from dataclasses import dataclass, field

from sqlalchemy.orm import Session

from app import models
from app.tables import Model, User

GENERIC, DIALOGUE = "gemma-3-270m", "smollm2-135m-instruct"


@dataclass
class Step:
    """One kind: what it is, the model that shows it, and what can be done next as (title, path)."""

    title: str
    says: str
    shown: str
    missing: str
    model: Model | None = None
    actions: list[tuple[str, str]] = field(default_factory=list)


def steps(session: Session, user: User) -> list[Step]:
    """The three steps as they stand in this studio."""
    ready = [m for m in models.list_(session, user) if m.status == "ready"]
    generic = _of_kind(ready, "generic", GENERIC)
    tuned = next((m for m in reversed(ready) if m.kind == "instruction" and m.base_id is not None), None)
    tuned = tuned or _of_kind(ready, "instruction", "")
    dialogue = _of_kind(ready, "dialogue", DIALOGUE)
    return [
        Step(
            "Generic: it continues a text",
            "It has read a great deal of text and learnt one thing: what comes next. A question may be answered, or followed by "
            "three more questions. Its prompt is the text itself.",
            "What is the capital of France?",
            f"Add {GENERIC}; its terms are shown first and must be accepted.",
            generic,
            [("Ask it", f"/playground?models={generic.name}")] if generic else [(f"Add {GENERIC}", f"/models/terms/{GENERIC}")],
        ),
        Step(
            "Instruction-tuned: it does one thing it is told",
            "The same weights, tuned on pairs of an instruction and its answer. Tune one here: take the generic model, a dataset of "
            "instructions (“plain-explanations” among the samples is one), and LoRA. A few minutes on a small model are enough to see it change.",
            "### User:\nWhat is the capital of France?\n\n### Assistant:\n",
            "Make it yourself: a job of a few minutes.",
            tuned,
            ([("Ask it", f"/playground?models={tuned.name}")] if tuned else [])
            + [
                ("Tune the generic model", f"/jobs/new?model={generic.name}" if generic else "/jobs/new"),
                ("Bring the sample", "/datasets"),
            ],
        ),
        Step(
            "Dialogue-tuned: it holds a conversation",
            "Tuned on whole conversations, so it knows turns, roles and when to stop. Every earlier turn is part of its prompt.",
            "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
            f"Add the starter {DIALOGUE}.",
            dialogue,
            [("Ask it", f"/playground?models={dialogue.name}")] if dialogue else [("Go to Models", "/models")],
        ),
    ]


def _of_kind(ready: list[Model], kind: str, name: str) -> Model | None:
    """The model this recipe means, or the first of the kind."""
    mine = [m for m in ready if m.kind == kind]
    return next((m for m in mine if m.name == name), mine[0] if mine else None)
