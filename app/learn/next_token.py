"""The next token: what a language model computes at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar
from urllib.parse import urlencode

from sqlalchemy.orm import Session

from app.errors import Unavailable
from app.inference import next_tokens
from app.inference.protocol import Entry
from app.kit.humanize import human_percent
from app.languages import gettext, mark, ngettext
from app.learn import _visits
from app.learn._base import Need, StartedStop, Stop, StopBar, StopBars, StopField, StopResult, Typed
from app.tables import StopVisit, User

TEXT = "The cat sat on"
SHOWN = 8


class NextTokenStop(Stop):
    name: ClassVar = "next-token"
    title: ClassVar = mark("The next token")
    place: ClassVar = 20
    idea: ClassVar = mark(
        "A generic language model predicts the next word, as autocomplete does: after “The cat sat on” it expects “the”. Everything else "
        "is built on this one step, repeated."
    )
    do: ClassVar = mark("The model gives every token of its vocabulary a probability; the likeliest ones are shown.")
    words: ClassVar = ("Token", "Sampling", "Temperature")
    needs: ClassVar[tuple[Need, ...]] = ("writes",)
    button: ClassVar = mark("Predict")
    reads: ClassVar = "read"

    def fields(self, session: Session, user: User, visit: StopVisit | None) -> list[StopField]:
        return [StopField("text", gettext("Text"), visit.refs["text"] if visit else TEXT, long=True)]

    def begin(self, session: Session, user: User, typed: Typed, visit: StopVisit | None) -> StartedStop:
        model = _visits.take_model(session, user, "writes")
        text = typed.get("text", "")
        (asked,) = next_tokens.ask(session, user, [model.name], text, SHOWN)
        return StartedStop({"text": text, "model": model.name}, asked={"next": asked})

    def heard(self, session: Session, user: User, begun: StartedStop, entries: Mapping[str, Sequence[Entry]]) -> None:
        found = next_tokens.view(begun.asked["next"], entries["next"])
        if found.error:
            raise Unavailable(found.error["message"], hint=found.error["hint"] or gettext("Try it again."))
        begun.refs["next"] = [[t.token, next_tokens.probability(t)] for t in found.following[:SHOWN]]
        begun.refs["tokens"] = [t.token for t in found.tokens]

    def look(self, session: Session, user: User, visit: StopVisit) -> StopResult:
        text, model, found = visit.refs["text"], visit.refs["model"], visit.refs["next"]
        (first, share), pieces = found[0], visit.refs["tokens"]
        bars = [StopBar(_shown(token), p, human_percent(p), path=_again(model, text + token)) for token, p in found]
        return StopResult(
            ended=True,
            headline=gettext(
                "After “%(text)s”: “%(token)s” with %(share)s",
                text=text[-60:],
                token=first.strip() or _shown(first),
                share=human_percent(share),
            ),
            bars=[
                StopBars(
                    gettext("Likeliest tokens after “%(text)s”, by %(model)s", text=text[-60:], model=model),
                    [bars[0]._replace(best=True), *bars[1:]],
                )
            ],
            notes=[
                ngettext(
                    "The text is %(num)s tokens to the model: %(tokens)s. Choose a token in the bars to go on with it.",
                    "The text is %(num)s tokens to the model: %(tokens)s. Choose a token in the bars to go on with it.",
                    len(pieces),
                    tokens=" · ".join(_shown(one) for one in pieces[:40]),
                )
            ],
            links=[(gettext("This view with more models"), _again(model, text))],
        )


def _shown(token: str) -> str:
    """A token with its spaces and line breaks visible."""
    return token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣") or "∅"


def _again(model: str, text: str) -> str:
    return f"/playground/next-tokens?{urlencode({'models': model, 'text': text})}"
