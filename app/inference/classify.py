"""Classification of texts by one or several classifiers: requests to the worker, and their results, for page and API."""

from __future__ import annotations

import contextlib
import itertools
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy.orm import Session

from app import limits
from app.errors import BadField, StudioError
from app.inference import playground
from app.inference.playground import MAX_PANES, Option
from app.inference.protocol import MAX_TEXTS, Classified, Done, Entry, GenerateRequest, Sampling, StreamError
from app.languages import gettext, mark
from app.models import service as models
from app.spec import ModelRef
from app.tables import User

MAX_TEXT_LENGTH = 200_000  # characters


class Sorting(NamedTuple):
    """The result of one classifier for some texts: for each its labels with their probabilities, most likely first."""

    name: str
    ref: ModelRef
    texts: list[list[tuple[str, float]]]
    cut: list[bool]
    tokens: int
    error: dict[str, Any] | None = None


def held_out(session: Session, user: User, names: Sequence[str], most: int = 6) -> list[str]:
    """Texts that the first of these classifiers with a job here was not trained on: of its validation rows, some of the easiest and
    of the hardest, in turn. Empty where it has none."""
    for name in names:
        with contextlib.suppress(StudioError):
            job, _ = models.origin(session, models.resolve(session, user, name))
            found = (job.evaluation or {}) if job else {}
            pairs = itertools.zip_longest(found.get("best") or [], found.get("worst") or [])
            texts = (" ".join(row["prompt"].split()) for pair in pairs for row in pair if row and row.get("prompt"))
            if shown := list(dict.fromkeys(text for text in texts if text))[:most]:
                return shown
    return []


def ask(session: Session, user: User, names: Sequence[str], texts: Sequence[str]) -> list[GenerateRequest]:
    """One request for each classifier. Raises BadField for no or too many models or texts, for one that is empty or too long, and
    for a model that is no classifier."""
    if not 1 <= len(names) <= MAX_PANES or len(set(names)) != len(names):
        raise BadField(
            gettext("Name between one and %(most)s different classifiers; %(count)s were named.", most=MAX_PANES, count=len(names)),
            param="model",
        )
    if not 1 <= len(texts) <= MAX_TEXTS:
        raise BadField(
            gettext("Give between one and %(most)s texts; %(count)s were given.", most=MAX_TEXTS, count=len(texts)), param="input"
        )
    for place, text in enumerate(texts):
        if not text.strip():
            raise BadField(gettext("Text %(place)s is empty.", place=place), hint=gettext("Remove it."), param="input")
        if len(text) > MAX_TEXT_LENGTH:
            raise BadField(
                gettext(
                    "Text %(place)s has %(count)s characters; %(most)s is the most.", place=place, count=len(text), most=MAX_TEXT_LENGTH
                ),
                hint=gettext("Shorten it."),
                param="input",
            )
    limits.check(session, user, "tokens_per_day")
    given = [playground.readable(text) for text in texts]
    return [
        GenerateRequest(id=uuid.uuid4(), owner=user.id, model=_classifier(session, user, name), classify=given, sampling=Sampling(), seed=0)
        for name in names
    ]


def _classifier(session: Session, user: User, name: str) -> ModelRef:
    ref = models.resolve(session, user, name).ref
    if ref.kind != "classifier" or not ref.labels:
        raise BadField(
            gettext("%(name)s is no classifier.", name=name),
            hint=gettext("Choose a model fine-tuned on labeled rows; the page Models lists them."),
            param="model",
        )
    return ref


def read(name: str, request: GenerateRequest, entries: Sequence[Entry]) -> Sorting:
    """A classifier's result, with the likeliest label first."""
    broke = next((e for e in entries if isinstance(e, StreamError)), None)
    found = next((e for e in entries if isinstance(e, Classified)), None)
    if broke or found is None:
        error = (
            {"message": broke.message, "hint": broke.hint}
            if broke
            else {"message": gettext("No answer came."), "hint": gettext("Ask again.")}
        )
        return Sorting(name, request.model, [], [], 0, error)
    done = next((e for e in entries if isinstance(e, Done)), None)
    texts = [sorted(zip(found.labels, p, strict=True), key=lambda pair: -pair[1]) for p in found.probabilities]
    return Sorting(name, request.model, texts, found.cut, done.prompt_tokens if done else 0)


def to_json(sorting: Sorting) -> dict[str, Any]:
    """The response of `POST /v1/classify`."""
    data = [
        {"object": "classification", "index": i, "label": said[0][0], "probabilities": dict(said), "truncated": cut}
        for i, (said, cut) in enumerate(zip(sorting.texts, sorting.cut, strict=True))
    ]
    usage = {"prompt_tokens": sorting.tokens, "total_tokens": sorting.tokens}
    return {"object": "list", "data": data, "model": sorting.name, "usage": usage}


def choices(session: Session, user: User, *named: str) -> dict[str, list[Option]]:
    """The classifiers on offer, newest first, those that are named among them."""
    rows = [m for m in models.offered(session, user, *named) if m.status == "ready" and m.kind == "classifier"]
    found = {
        mark("Classifiers"): [playground.option(m) for m in reversed(rows)],
        mark("Aliases"): playground.alias_options(session, user, rows),
    }
    return {group: options for group, options in found.items() if options}
