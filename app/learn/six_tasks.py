"""One model, six tasks: what a model does is decided by its prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from sqlalchemy.orm import Session

from app.inference.protocol import Entry
from app.languages import gettext, mark, ngettext
from app.learn import _asking, _visits
from app.learn._base import Need, StartedStop, Stop, StopButton, StopResult, Typed
from app.tables import StopVisit, User

REVIEW = "The violin arrived two weeks late and the bow was broken, but the shop answered at once and sent a new one."
TASKS: dict[str, tuple[str, str]] = {
    "chat": (mark("Chat"), "What can I cook with eggs, tomatoes and old bread?"),
    "summary": (
        mark("Summary"),
        "Summarize in one sentence: The town library closes at six in winter. From May it stays open until eight, because students "
        "asked for it. Books can be returned at any hour through the slot in the door.",
    ),
    "translation": (mark("Translation"), "Translate into French: The cat sleeps on the chair."),
    "sentiment": (mark("Sentiment"), f"Is this review positive or negative? Answer with one word. Review: {REVIEW}"),
    "extraction": (mark("Extraction"), f"List the two problems that the customer names. Review: {REVIEW}"),
    "continuation": (mark("Continuation"), "Continue this story: The old violin maker opened the door, and there stood"),
}


class SixTasksStop(Stop):
    name: ClassVar = "six-tasks"
    title: ClassVar = mark("One model, six tasks")
    place: ClassVar = 10
    idea: ClassVar = mark(
        "Large language models are transformers trained on very much text. One and the same model chats, summarizes, translates and "
        "analyzes: only the prompt differs."
    )
    do: ClassVar = mark("Six prompts go to one model. Nothing of it changes between them.")
    words: ClassVar = ("Base model", "Temperature", "Hallucination")
    needs: ClassVar[tuple[Need, ...]] = ("writes",)

    def buttons(self, session: Session, user: User, visit: StopVisit | None) -> list[StopButton]:
        return [StopButton("", gettext("All six")), *(StopButton(key, gettext(title)) for key, (title, _) in TASKS.items())]

    def begin(self, session: Session, user: User, typed: Typed, visit: StopVisit | None) -> StartedStop:
        """All six, or one more of them next to those of the visit before."""
        one = typed.get("do", "")
        kept = dict((visit.refs.get("exchanges") or {}) if visit and one in TASKS else {})
        model = _visits.take_model(session, user, "writes")
        begun = StartedStop({"exchanges": kept, "model": model.name})
        for key in [one] if one in TASKS else TASKS:
            exchange, begun.asked[key] = _asking.ask(session, user, model.name, TASKS[key][1])
            kept[key] = str(exchange.id)
        return begun

    def heard(self, session: Session, user: User, begun: StartedStop, entries: Mapping[str, Sequence[Entry]]) -> None:
        _asking.record(session, begun, entries)

    def look(self, session: Session, user: User, visit: StopVisit) -> StopResult:
        titles = {key: gettext(title) for key, (title, _) in TASKS.items()}
        found = _asking.answers(session, user, visit, titles)
        fault = _asking.fault_of(session, visit)
        texts = [found[key]._replace(prompt=found[key].prompt or prompt) for key, (_, prompt) in TASKS.items() if key in found]
        return StopResult(
            ended=len(found) == len(TASKS) and not fault,
            fault=fault,
            headline=ngettext("%(model)s did %(num)s task", "%(model)s did %(num)s tasks", len(found), model=visit.refs["model"]),
            texts=texts,
            bars=_asking.token_bars(session, visit, titles, "completion_tokens", gettext("Tokens of each answer")),
            notes=[] if len(found) == len(TASKS) else [gettext("%(count)s to go.", count=len(TASKS) - len(found))],
        )
