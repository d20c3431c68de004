"""The playground: one prompt, several models, answers in columns. The plain form works without JavaScript; the script streams."""

from __future__ import annotations

import functools
import json
import uuid
from collections.abc import AsyncIterator, Mapping
from itertools import zip_longest
from typing import Annotated, Any

from fastapi import APIRouter, Form, Query, Request
from fastapi.responses import RedirectResponse, Response
from pydantic import BaseModel, Field, create_model
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from app.db import Db, transaction
from app.errors import BadField, NotFound, StudioError
from app.inference import playground, residency, tryout, votes
from app.inference.answer_fold import AnswerFold
from app.inference.playground import PendingAnswer
from app.inference.protocol import MAX_STOPS, ChoiceFinished, Done, Entry, Sampling, StreamError
from app.kit import forms
from app.languages import gettext, mark, ngettext
from app.tables import Exchange, User
from app.views import lists
from app.web import templates as web_templates
from app.web.auth import CurrentUser
from app.web.navigation import MenuPage
from app.web.streaming import Stream, later, left, merge, stream_or_error, while_connected

pages = APIRouter()
MENU = (MenuPage(mark("Chat"), "/playground", "playground", 10),)

_PLAIN = ("top_p", "max_tokens", "seed", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
_KNOBS: dict[str, Any] = {
    "system": (
        str,
        Field("", max_length=20_000, title=mark("System prompt"), description=mark("Chat and instruct models read it before all turns.")),
    ),
    "temperature": (float, Field(0.0, ge=0, le=2, description=mark("0 is deterministic: the likeliest token. Higher is more varied."))),
    **{name: (Sampling.model_fields[name].annotation, Sampling.model_fields[name]) for name in _PLAIN},
    "stop": (
        str,
        Field("", max_length=4096, title=mark("Stop sequences"), description=mark("The answer ends before any of these; one per line.")),
    ),
}
_LABELS = (
    mark("Temperature"), mark("Top p"), mark("Max tokens"), mark("Seed"), mark("Top k"), mark("Min p"), mark("Repetition penalty"),
    mark("Frequency penalty"), mark("Presence penalty"),
)  # fmt: skip
"""Labels that the form makes of the names of the others."""
Knobs: type[BaseModel] = create_model("Knobs", **_KNOBS)
"""Fields of `Sampling` that the form offers. The playground is deterministic by default; the API samples by default, as OpenAI's
does."""
STOPS = {
    "stop": mark("End of answer"),
    "length": mark("Stopped at max tokens"),
    "cancelled": mark("Stopped by you"),
    "error": mark("No answer"),
}
"""Labels of finish reasons."""


class Order(BaseModel):
    """The posted form: models, prompt, sampling settings, and the exchange that it continues."""

    models: list[str]
    prompt: str
    sampling: Sampling
    system: str
    parent: uuid.UUID | None
    follows: dict[str, str]


def _uuid(text: str | None) -> uuid.UUID | None:
    try:
        return uuid.UUID(text) if text else None
    except ValueError:
        raise NotFound(gettext("The turn this goes on from does not exist."), hint=gettext("Start a new conversation.")) from None


def _asked_before(user: User, exchange_id: uuid.UUID) -> tuple[uuid.UUID | None, str]:
    """The prompt of an exchange and the turn before it; sending it again adds another answer to the same prompt."""
    with transaction() as session:
        found = playground.get(session, user, exchange_id)
        return found.parent_id, found.prompt or ""


async def _order(request: Request, user: User) -> Order:
    form = await request.form(max_fields=64, max_files=0)
    data = {key: str(value) for key, value in form.items()}
    filled = forms.fill(Knobs, data, "sampling")
    if filled.errors:
        name, sentence = next(iter(filled.errors.items()))
        raise BadField(sentence, param=f"sampling.{name}" if name else "sampling")
    settings = Knobs(**filled.settings).model_dump()
    system, stops = settings.pop("system", ""), settings.pop("stop", "").splitlines()
    if len(stops) > MAX_STOPS:
        message = gettext("%(num)s stop texts were given; %(most)s is the most.", num=len(stops), most=MAX_STOPS)
        raise BadField(message, param="sampling.stop")
    named = zip_longest(form.getlist("models"), form.getlist("follows"), fillvalue="")
    follows = {str(name): str(old) or str(name) for name, old in named if name}
    parent = _uuid(data.get("parent"))
    prompt = data.get("prompt", "").replace("\r\n", "\n")
    if again := _uuid(data.get("again")):
        parent, prompt = await run_in_threadpool(_asked_before, user, again)
    return Order(
        models=[str(name) for name in form.getlist("models") if name],
        prompt=prompt,
        sampling=Sampling(**settings, stop=tuple(s[:256] for s in stops if s)),
        system=system,
        parent=parent,
        follows=follows,
    )


# The page -------------------------------------------------------------------------------------------------------------


def _names(given: list[str] | None) -> list[str]:
    return [name for part in given or [] for name in part.split(",") if name]


@pages.get("/playground")
def show_empty(
    request: Request,
    session: Db,
    user: CurrentUser,
    models: Annotated[list[str] | None, Query()] = None,
    question: Annotated[int | None, Query(description="line of a validation row")] = None,
    prompt: Annotated[str, Query(max_length=20_000)] = "",
) -> Response:
    named = _names(models)[: playground.MAX_PANES]
    look = tryout.look_at(session, user, named) if question is not None else None
    chosen = next((q for q in look.questions if q["line"] == question), None) if look else None
    more = {"question": chosen, "prompt": chosen["prompt"]} if chosen else {"prompt": prompt}
    return _page(request, session, user, named, None, **more)


@pages.get("/playground/{exchange_id:uuid}")
def show(
    request: Request,
    session: Db,
    user: CurrentUser,
    exchange_id: uuid.UUID,
    models: Annotated[list[str] | None, Query()] = None,
    follows: Annotated[list[str] | None, Query()] = None,
    edit: bool = False,
) -> Response:
    """A conversation as it ended, or before its last prompt where that is edited; its columns may continue with other models."""
    last = playground.get(session, user, exchange_id)
    asked = last.sampling.get("models") or [a.model_name for a in playground.answers(session, [last.id])[last.id]]
    named = _names(models)[: playground.MAX_PANES] or asked
    old = _names(follows) if models else [(last.sampling.get("follows") or {}).get(name, name) for name in named] if edit else []
    taken_over = dict(zip(named, old, strict=False))
    if edit:
        return _page(request, session, user, named, last.parent_id, taken_over, prompt=last.prompt, typed=forms_text(last))
    return _page(request, session, user, named, exchange_id, taken_over)


def _page(
    request: Request,
    session: Session,
    user: User,
    named: list[str],
    key: uuid.UUID | None,
    follows: Mapping[str, str] | None = None,
    typed: dict[str, str] | None = None,
    **more: Any,
) -> Response:
    thread = playground.thread(session, user, key) if key else []
    choices = playground.choices(session, user, *named)
    ready = [choice.name for group in choices.values() for choice in group]
    named = list(dict.fromkeys(named)) or ready[:1]
    known = [name for name in named if playground.option_of(name, choices).kind]  # those that still exist
    look, own = tryout.look_at(session, user, known), tryout.own_sampling(session, user, known)
    last = thread[-1][0] if thread else None
    asked_of = more.get("question") or (look and next((q for q in look.questions if last and q["prompt"] == last.prompt), None))
    if typed is None and last is not None:
        typed = forms_text(last)
    if typed is None:
        system = (asked_of or {}).get("system") or (look.system if look else "")
        typed = {name: forms.as_text(value) for name, value in own.items()} | {"system": system}
    typed |= {name.removeprefix("sampling."): value for name, value in request.query_params.items() if name.startswith("sampling.")}
    context = {
        "panes": [playground.pane(name, choices, thread, (follows or {}).get(name, "")) for name in named],
        "choices": choices,
        "most_panes": playground.MAX_PANES,
        "parent": key,
        "asked": thread[0][0].prompt if thread else "",
        "title": (last.title or "") if last else "",
        "controls": forms.controls(Knobs, "sampling", typed=typed),
        "look": look,
        "own": own,
        "question": asked_of,
        "public_id": lists.public_id,
        "history": playground.history(session, user, limit=20),
        "proof": playground.proof,
        "stops": STOPS,
        "prompt": "",
        "error": None,
        **residency.part(session, user),
    }
    return web_templates.render(request, "playground.html", **(context | more))


def forms_text(exchange: Exchange) -> dict[str, str]:
    """Stored settings as form values, so that the next turn uses the same settings."""
    sampling, messages = exchange.sampling, exchange.messages
    typed = {name: forms.as_text(sampling.get(name)) for name in ("temperature", *_PLAIN) if name in sampling and name != "seed"}
    return typed | {"stop": "\n".join(sampling.get("stop", [])), "system": messages[0]["content"] if messages else ""}


# Asking ---------------------------------------------------------------------------------------------------------------


def _ask(user: User, order: Order) -> tuple[uuid.UUID, list[PendingAnswer]]:
    with transaction() as session:
        exchange, asked = playground.ask(
            session, user, order.models, order.prompt, order.sampling, system=order.system, parent=order.parent, follows=order.follows
        )
        return exchange.id, asked


def _record_all(exchange_id: uuid.UUID, asked: list[PendingAnswer], heard: list[AnswerFold]) -> None:
    for one, said in zip(asked, heard, strict=True):
        _record(exchange_id, one, said)


def _record(exchange_id: uuid.UUID, asked: PendingAnswer, heard: AnswerFold) -> None:
    with transaction() as session:
        playground.record(session, exchange_id, asked, heard)


@pages.post("/playground")
async def ask_and_wait(request: Request, user: CurrentUser) -> Response:
    """Without JavaScript: the page is sent when all models have finished. If the browser disconnects, generation stops."""
    try:
        order = await _order(request, user)
        exchange_id, asked = await run_in_threadpool(_ask, user, order)
    except StudioError as error:
        form = await request.form()
        return await run_in_threadpool(
            _again, request, user, [str(m) for m in form.getlist("models") if m], str(form.get("prompt", "")), error
        )
    heard = [AnswerFold() for _ in asked]

    async def listen_to_all() -> None:
        async for place, entries in merge([stream_or_error(one.request) for one in asked]):
            heard[place].take(entries)

    if not await while_connected(request, listen_to_all()):
        later(lambda: _record_all(exchange_id, asked, heard))
        return left()
    await run_in_threadpool(_record_all, exchange_id, asked, heard)
    return RedirectResponse(f"/playground/{exchange_id}", status_code=303)


def _again(request: Request, user: User, named: list[str], prompt: str, error: StudioError) -> Response:
    """The form as it was sent, with the error above it."""
    with transaction() as session:
        page = _page(request, session, user, named, None, prompt=prompt, error=error)
    page.status_code = error.status
    return page


@pages.post("/playground/stream")
async def ask_and_stream(request: Request, user: CurrentUser) -> Response:
    """With JavaScript: one JSON object per line and entry, each for one column, as they arrive."""
    order = await _order(request, user)
    exchange_id, asked = await run_in_threadpool(_ask, user, order)
    return Stream(_lines(exchange_id, asked), media_type="application/x-ndjson")


async def _lines(exchange_id: uuid.UUID, asked: list[PendingAnswer]) -> AsyncIterator[bytes]:
    heard, stored = [AnswerFold() for _ in asked], set()
    merged = merge([stream_or_error(one.request) for one in asked])
    try:
        panes = [{"model": one.speaker.name, "kind": one.speaker.ref.kind, "answer": str(one.request.id)} for one in asked]
        yield _line({"type": "asked", "exchange": str(exchange_id), "panes": panes})
        async for place, entries in merged:
            heard[place].take(entries)
            for entry in entries:
                if isinstance(entry, Done | StreamError):
                    stored.add(place)
                    await run_in_threadpool(_record, exchange_id, asked[place], heard[place])
                yield _line(_told(place, asked[place], heard[place], entry))
        yield _line({"type": "end"})
    finally:
        # Stopped or disconnected: the text generated so far is stored.
        for place in set(range(len(asked))) - stored:
            later(functools.partial(_record, exchange_id, asked[place], heard[place]))
        await merged.aclose()  # type: ignore[attr-defined]


def _told(place: int, asked: PendingAnswer, heard: AnswerFold, entry: Entry) -> dict[str, Any]:
    said = {"pane": place, **entry.model_dump(mode="json", exclude_defaults=False)}
    if isinstance(entry, Done):
        who = asked.speaker
        engine = asked.request.engine.host if asked.request.engine else None
        said["proof"] = playground.proof_line(who.adapter_sha256, who.ref.revision, entry.tokens_per_second, asked.request.seed, engine)
    if isinstance(entry, ChoiceFinished):
        said |= {"note": gettext(STOPS[entry.reason]), "html": str(web_templates.markdown(heard.choices[entry.index].text))}
    return said


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


@pages.post("/playground/prefer")
def prefer(request: Request, session: Db, user: CurrentUser, answer: Annotated[uuid.UUID, Form()]) -> Response:
    """Record one answer as preferred over the others to the same prompt, as votes."""
    exchange, count = votes.prefer(session, user, answer)
    said = ngettext(
        "%(num)s vote added. Blind A/B makes datasets of all votes.", "%(num)s votes added. Blind A/B makes datasets of all votes.", count
    )
    web_templates.flash(request, said)
    return RedirectResponse(f"/playground/{exchange.id}", status_code=303)
