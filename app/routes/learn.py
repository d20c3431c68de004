"""The reading room: the stops, one page each, and the click that starts one."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import RedirectResponse, Response
from sqlalchemy import func, select
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from app.db import Db, transaction
from app.errors import Conflict, NotFound, StudioError
from app.inference import reading
from app.languages import gettext, mark
from app.learn import STOPS, StartedStop, Stop, StopResult, _visits
from app.tables import User
from app.views.glossary import GLOSSARY
from app.web import templates as web_templates
from app.web.auth import CurrentUser
from app.web.navigation import MenuPage
from app.web.streaming import collect, left, stream_or_error

pages = APIRouter()
PAGE = "/learn"
MENU = (MenuPage(mark("Reading room"), PAGE, "end", 5),)
READ_SECONDS = 30.0
"""How long a click waits until the sample of a stop is read. No database connection is held meanwhile."""


@pages.get(PAGE)
def room(request: Request, session: Db, user: CurrentUser) -> Response:
    done = _visits.done(session, user)
    headlines = {name: _visits.headline(session, user, STOPS[name], visit) for name, visit in done.items() if name in STOPS}
    return web_templates.render(request, "learn.html", stops=list(STOPS.values()), done=done, headlines=headlines)


def _stop(name: str) -> Stop:
    if name not in STOPS:
        message = gettext("There is no stop %(name)s.", name=repr(name[:60]))
        raise NotFound(message, hint=gettext("The reading room lists every one."), param="stop")
    return STOPS[name]


@pages.get(PAGE + "/{stop}")
def stop_page(
    request: Request,
    session: Db,
    user: CurrentUser,
    stop: str,
    visit: Annotated[uuid.UUID | None, Query(description="An earlier one")] = None,
) -> Response:
    return _page(request, session, user, _stop(stop), visit)


def _page(
    request: Request,
    session: Session,
    user: User,
    stop: Stop,
    key: uuid.UUID | None = None,
    fault: StudioError | None = None,
    typed: Mapping[str, str] = MappingProxyType({}),
) -> Response:
    visits = _visits.newest(session, user, stop.name)
    shown = _visits.get(session, user, key, stop.name) if key else next(iter(visits), None)
    result = StopResult()
    if shown is not None:
        result = stop.look(session, user, shown)
        _visits.settle(session, user, stop, shown, result)
    names = list(STOPS)
    place = names.index(stop.name)
    context: dict[str, Any] = {
        "stop": stop, "shown": shown, "visits": visits, "result": result, "fault": fault, "number": place + 1, "stops": len(names),
        "missing": _visits.missing(session, user, stop), "fields": stop.fields(session, user, shown), "typed": typed,
        "buttons": stop.buttons(session, user, shown), "words": [(word, GLOSSARY[word]) for word in stop.words],
        "headlines": {one.id: _visits.headline(session, user, stop, one) for one in visits}, "page": f"{PAGE}/{stop.name}",
        "before": STOPS[names[place - 1]] if place else None, "after": STOPS[names[place + 1]] if place + 1 < len(names) else None,
    }  # fmt: skip
    return web_templates.render(request, "learn_stop.html", status_code=fault.status if fault else 200, **context)


@pages.post(PAGE + "/{stop}")
async def start(request: Request, user: CurrentUser, stop: str) -> Response:
    """Start what the stop is about, and wait for answers that take seconds; runs and evaluations go on by themselves."""
    found = _stop(stop)
    form = await request.form(max_fields=32, max_files=0)
    typed = {key: str(value).replace("\r\n", "\n")[:20_000] for key, value in form.items()}
    try:
        await _samples_read(user, found)
        begun = await run_in_threadpool(_begin, user, found, typed)
        heard = await collect(request, [stream_or_error(one.request) for one in begun.asked.values()]) if begun.asked else []
        if heard is None:
            return left()
        await run_in_threadpool(_keep, user, found, begun, heard)
    except StudioError as fault:
        return await run_in_threadpool(_again, request, user, found, fault, typed)
    return RedirectResponse(f"{PAGE}/{stop}#result", status_code=303)


def _begin(user: User, stop: Stop, typed: dict[str, str]) -> StartedStop:
    """What is started, with its visit where nothing is waited for: a visit without answers would be an empty page."""
    with transaction() as session:
        before = next(iter(_visits.newest(session, user, stop.name, 1)), None)
        at = session.scalar(select(func.clock_timestamp()))
        begun = stop.begin(session, user, typed, before)
        begun.at = at
        if not begun.asked:
            _visits.add(session, user, stop, begun)
        return begun


def _keep(user: User, stop: Stop, begun: StartedStop, heard: list[Any]) -> None:
    if stop.reads:
        reading.count(user, heard, encoded=stop.reads == "encoded")
    if begun.asked:
        with transaction() as session:
            stop.heard(session, user, begun, dict(zip(begun.asked, heard, strict=True)))
            _visits.add(session, user, stop, begun)


async def _samples_read(user: User, stop: Stop) -> None:
    """The stop's samples as datasets that are read. Raises Conflict where that takes too long."""
    end = time.monotonic() + READ_SECONDS
    while await run_in_threadpool(_unread, user, stop):
        if time.monotonic() > end:
            message = gettext("The sample of this stop is still being read.")
            raise Conflict(message, hint=gettext("Try again in a moment."), code="still_reading")
        await asyncio.sleep(0.2)


def _unread(user: User, stop: Stop) -> bool:
    with transaction() as session:
        return any(one.status != "ready" for one in stop.datasets(session, user))


def _again(request: Request, user: User, stop: Stop, fault: StudioError, typed: dict[str, str]) -> Response:
    with transaction() as session:
        return _page(request, session, user, stop, None, fault, typed)
