"""The playground: one prompt, several models, answers side by side. A plain form works; the script streams."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import RedirectResponse, Response
from pydantic import BaseModel, Field, create_model
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from app import forms, playground, standby, web
from app.accounts import CurrentUser
from app.db import Db, transaction
from app.errors import BadField, NotFound, StudioError
from app.generation import MOST_STOPS, Broke, Done, Entry, Sampling
from app.listening import listen_calmly
from app.playground import Asked, Heard
from app.streams import Stream, later, left, merge, while_connected
from app.tables import User

pages = APIRouter()

_PLAIN = ("temperature", "top_p", "max_tokens", "seed", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
Knobs: type[BaseModel] = create_model(
    "Knobs",
    **{name: (Sampling.model_fields[name].annotation, Sampling.model_fields[name]) for name in _PLAIN},
    stop=(str, Field("", max_length=4096, description="The answer ends before any of these texts; one in each line.")),
    system=(
        str,
        Field("", max_length=20_000, title="System message", description="Told to dialogue and instruction models before all turns."),
    ),
)
"""The form of the sampling settings: the fields of `Sampling` a person turns, with their own words."""


class Order(BaseModel):
    """What the form says: which models, the prompt, the settings, and the turn it goes on from."""

    models: list[str]
    prompt: str
    sampling: Sampling
    system: str
    parent: uuid.UUID | None


async def _order(request: Request) -> Order:
    form = await request.form(max_fields=64, max_files=0)
    data = {key: str(value) for key, value in form.items()}
    filled = forms.fill(Knobs, data, "sampling")
    if filled.errors:
        name, sentence = next(iter(filled.errors.items()))
        raise BadField(sentence, param=f"sampling.{name}" if name else "sampling")
    settings = dict(filled.settings)
    system, stops = settings.pop("system", ""), settings.pop("stop", "").splitlines()
    if len(stops) > MOST_STOPS:
        raise BadField(f"{len(stops)} stop texts were given; {MOST_STOPS} is the most.", param="sampling.stop")
    try:
        parent = uuid.UUID(data["parent"]) if data.get("parent") else None
    except ValueError:
        raise NotFound("The turn this goes on from does not exist.", way_out="Start a new conversation.") from None
    return Order(
        models=[str(name) for name in form.getlist("models") if name],
        prompt=data.get("prompt", "").replace("\r\n", "\n"),
        sampling=Sampling(**settings, stop=tuple(s[:256] for s in stops if s)),
        system=system,
        parent=parent,
    )


# The page -------------------------------------------------------------------------------------------------------------


@pages.get("/playground")
def show_empty(request: Request, session: Db, user: CurrentUser, models: Annotated[list[str] | None, Query()] = None) -> Response:
    named = [name for part in models or [] for name in part.split(",") if name]
    return _page(request, session, user, named[: playground.MOST_PANES], None)


@pages.get("/playground/{exchange_id:uuid}")
def show(request: Request, session: Db, user: CurrentUser, exchange_id: uuid.UUID) -> Response:
    last = playground.get(session, user, exchange_id)
    named = last.sampling.get("models") or [a.model_name for a in playground.answers(session, [last.id])[last.id]]
    return _page(request, session, user, named, exchange_id)


def _page(request: Request, session: Session, user: User, named: list[str], key: uuid.UUID | None, **more: Any) -> Response:
    turns = playground.thread(session, user, key) if key else []
    choices = playground.choices(session, user)
    ready = [choice.name for group in choices.values() for choice in group]
    if not named and ready:
        named = ready[:1]
    typed = forms_text(turns[-1][0].sampling, turns[-1][0].messages) if turns else {}
    context = {
        "panes": [playground.pane(name, choices, turns) for name in dict.fromkeys(named)],
        "choices": choices,
        "most_panes": playground.MOST_PANES,
        "parent": key,
        "title": (turns[-1][0].title or "") if turns else "",
        "controls": forms.controls(Knobs, "sampling", typed=typed),
        "history": playground.history(session, user, limit=20),
        "proof": playground.proof,
        "prompt": "",
        "error": None,
        **standby.part(session, user),
    }
    return web.render(request, "playground.html", **(context | more))


def forms_text(sampling: dict[str, Any], messages: list[Any] | None) -> dict[str, str]:
    """Stored settings as the inputs show them, so that the next turn is asked the same way."""
    typed = {name: forms.as_text(sampling.get(name)) for name in _PLAIN if name in sampling and name != "seed"}
    return typed | {"stop": "\n".join(sampling.get("stop", [])), "system": messages[0]["content"] if messages else ""}


# Asking ---------------------------------------------------------------------------------------------------------------


def _ask(user: User, order: Order) -> tuple[uuid.UUID, list[Asked]]:
    with transaction() as session:
        exchange, asked = playground.ask(
            session, user, order.models, order.prompt, order.sampling, system=order.system, parent=order.parent
        )
        return exchange.id, asked


def _record_all(exchange_id: uuid.UUID, asked: list[Asked], heard: list[Heard]) -> None:
    for one, said in zip(asked, heard, strict=True):
        _record(exchange_id, one, said)


def _record(exchange_id: uuid.UUID, asked: Asked, heard: Heard) -> None:
    with transaction() as session:
        playground.record(session, exchange_id, asked, heard)


@pages.post("/playground")
async def ask_and_wait(request: Request, user: CurrentUser) -> Response:
    """Without the script: the page comes once all models have finished. A browser that leaves first stops them."""
    try:
        order = await _order(request)
        exchange_id, asked = await run_in_threadpool(_ask, user, order)
    except StudioError as error:
        form = await request.form()
        return await run_in_threadpool(
            _again, request, user, [str(m) for m in form.getlist("models") if m], str(form.get("prompt", "")), error
        )
    heard = [Heard() for _ in asked]

    async def listen_to_all() -> None:
        async for place, entries in merge([listen_calmly(one.request) for one in asked]):
            heard[place].take(entries)

    if not await while_connected(request, listen_to_all()):
        later(lambda: _record_all(exchange_id, asked, heard))
        return left()
    await run_in_threadpool(_record_all, exchange_id, asked, heard)
    return RedirectResponse(f"/playground/{exchange_id}", status_code=303)


def _again(request: Request, user: User, named: list[str], prompt: str, error: StudioError) -> Response:
    """The form as it was, with what is wrong above it."""
    with transaction() as session:
        page = _page(request, session, user, named, None, prompt=prompt, error=error)
    page.status_code = error.status
    return page


@pages.post("/playground/stream")
async def ask_and_stream(request: Request, user: CurrentUser) -> Response:
    """The same for the script: one JSON object per line, each of one pane, as they come."""
    order = await _order(request)
    exchange_id, asked = await run_in_threadpool(_ask, user, order)
    return Stream(_lines(exchange_id, asked), media_type="application/x-ndjson")


async def _lines(exchange_id: uuid.UUID, asked: list[Asked]) -> AsyncIterator[bytes]:
    heard, stored = [Heard() for _ in asked], set()
    merged = merge([listen_calmly(one.request) for one in asked])
    try:
        panes = [{"model": one.speaker.name, "kind": one.speaker.ref.kind} for one in asked]
        yield _line({"type": "asked", "exchange": str(exchange_id), "panes": panes})
        async for place, entries in merged:
            heard[place].take(entries)
            for entry in entries:
                if isinstance(entry, Done | Broke):
                    stored.add(place)
                    await run_in_threadpool(_record, exchange_id, asked[place], heard[place])
                yield _line(_told(place, asked[place], heard[place], entry))
        yield _line({"type": "end"})
    finally:
        # Stopped or left in the middle: what was said so far is kept.
        for place in set(range(len(asked))) - stored:
            later(lambda place=place: _record(exchange_id, asked[place], heard[place]))
        await merged.aclose()  # type: ignore[attr-defined]


def _told(place: int, asked: Asked, heard: Heard, entry: Entry) -> dict[str, Any]:
    said = {"pane": place, **entry.model_dump(mode="json", exclude_defaults=False)}
    if isinstance(entry, Done):
        who = asked.speaker
        engine = asked.request.engine.host if asked.request.engine else None
        said["proof"] = playground.proof_line(who.adapter_sha256, who.ref.revision, entry.tokens_per_second, asked.request.seed, engine)
    return said


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"
