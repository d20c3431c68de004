"""Generic, instruction-tuned and dialogue-tuned: the same words in three kinds of prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from sqlalchemy.orm import Session

from app.inference.protocol import Entry
from app.languages import gettext, mark
from app.learn import _asking, _visits
from app.learn._base import Need, StartedStop, Stop, StopResult, Typed
from app.models import service as models
from app.tables import Model, StopVisit, User

QUESTION = "What is the capital of France?"
TEXT = f"Questions of the geography test:\n1. {QUESTION}\n2."
"""For a generic model: it goes on with the list. Asked the question alone, a chat model in its place ends at once."""
TURNS = (
    {"role": "user", "content": "I am planning a journey to France in May."},
    {"role": "assistant", "content": "That is a fine month to go. What would you like to know?"},
    {"role": "user", "content": QUESTION},
)

STAND_INS = (mark("generic"), mark("instruction"), mark("generic or instruction"))
"""The kinds whose place a chat model takes, as a note says them."""


class KindsStop(Stop):
    name: ClassVar = "kinds"
    title: ClassVar = mark("Generic, instruction-tuned, dialogue-tuned")
    place: ClassVar = 40
    idea: ClassVar = mark(
        "A generic model predicts the next word of a text. An instruction-tuned model answers the instruction in its input. A "
        "dialogue-tuned model is a special case of it: its prompt is a conversation whose roles are clearly marked."
    )
    do: ClassVar = mark(
        "“What is the capital of France?” in a text that goes on, as one instruction, and as the last turn of a conversation."
    )
    words: ClassVar = ("Base model", "Chat template", "System prompt", "Fine-tuning")
    needs: ClassVar[tuple[Need, ...]] = ("writes",)
    button: ClassVar = mark("Ask all three")

    def begin(self, session: Session, user: User, typed: Typed, visit: StopVisit | None) -> StartedStop:
        """Each kind answers with a model of its own where there is one; otherwise one model is prompted in all three ways."""
        ready = _visits.bases(session, user)
        chat = _visits.take_model(session, user, "writes")
        generic, instruction = _first(ready, "generic") or chat, _newest(session, user) or _first(ready, "instruction") or chat
        dialogue = chat if chat.kind == "dialogue" else _first(ready, "dialogue") or chat
        begun = StartedStop(
            {"exchanges": {}, "stand_ins": [key for key, m in (("generic", generic), ("instruction", instruction)) if m is chat]}
        )
        asked = {
            "generic": _asking.ask_raw(session, user, generic.name, TEXT),
            "instruction": _asking.ask(session, user, instruction.name, QUESTION),
            "dialogue": _asking.ask_raw(session, user, dialogue.name, QUESTION, messages=list(TURNS)),
        }
        for key, (exchange, pending) in asked.items():
            begun.refs["exchanges"][key], begun.asked[key] = str(exchange.id), pending
        return begun

    def heard(self, session: Session, user: User, begun: StartedStop, entries: Mapping[str, Sequence[Entry]]) -> None:
        _asking.record(session, begun, entries)

    def look(self, session: Session, user: User, visit: StopVisit) -> StopResult:
        titles = {
            "generic": gettext("Generic: it continues the text"),
            "instruction": gettext("Instruction-tuned: it answers"),
            "dialogue": gettext("Dialogue-tuned: it takes its turn"),
        }
        found = _asking.answers(session, user, visit, titles)
        fault = _asking.fault_of(session, visit)
        stand_ins = visit.refs.get("stand_ins") or []
        notes = [gettext("The question is the same in all three prompts. Open each to see what is around it.")]
        if stand_ins:
            notes.append(
                gettext(
                    "No model of the kind %(kind)s is installed, so the chat model takes its place: without its chat template "
                    "it gets the text alone, as a generic model does. What it was trained on still shows.",
                    kind=gettext(" or ".join(stand_ins)),
                )
            )
        return StopResult(
            ended=len(found) == len(titles) and not fault,
            fault=fault,
            headline=gettext("One question, three kinds of prompt"),
            notes=notes,
            texts=list(found.values()),
            bars=_asking.token_bars(
                session, visit, titles, "prompt_tokens", gettext("Tokens of each prompt: the question, and what is around it")
            ),
            links=[(gettext("Train the instruction model yourself"), "/playground/tutorial")],
        )


def _first(found: Sequence[Model], kind: str) -> Model | None:
    return next((m for m in found if m.kind == kind), None)


def _newest(session: Session, user: User) -> Model | None:
    """The instruction model that was fine-tuned here last."""
    return next((m for m in reversed(models.offered(session, user)) if m.kind == "instruction" and m.base_id and m.status == "ready"), None)
