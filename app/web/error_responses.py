"""Exceptions as responses: `{"error": {...}}` for programs, a page with the hint for people."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

import redis
import structlog
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, RedirectResponse
from pydantic import ValidationError
from sqlalchemy.exc import DataError, DBAPIError, InterfaceError, OperationalError, TimeoutError
from starlette.exceptions import HTTPException

from app import errors, queue
from app.errors import BadField, DiskFull, NotSignedIn, StudioError, TooMany, Unavailable
from app.languages import gettext, mark, ngettext
from app.web.accepts import is_program

log = structlog.get_logger("luthier.web")
POSTGRES_DISK_FULL, POSTGRES_OUT_OF_RANGE = "53100", "22003"
_WAYS_OUT = {
    404: mark("Check the address, or start again from Home."),
    405: mark("This address exists, but it does not take this method."),
    413: mark("Send less at once."),
    416: mark("Ask for a part that is there."),
}


def fault_of(error: Exception) -> StudioError:
    """The StudioError for an exception. An unexpected one becomes a plain 500 without internals."""
    match error:
        case StudioError():
            return error
        case RequestValidationError():
            return _bad_field(error.errors())
        case ValidationError():
            return _bad_field(error.errors(include_url=False))
        case HTTPException():
            return _from_http(error)
        case DataError() if "NUL" in str(error.orig):
            return BadField(
                gettext("A text here holds a NUL character, which no database can store."),
                hint=gettext("Remove it and send the request again."),
            )
        case DataError() if getattr(error.orig, "sqlstate", None) == POSTGRES_OUT_OF_RANGE:
            return BadField(gettext("A number here is larger than the database can hold."), hint=gettext("Send a smaller one."))
        case OperationalError() if getattr(error.orig, "sqlstate", None) == POSTGRES_DISK_FULL:
            return DiskFull(gettext("The disk of the database is full; nothing was saved."))
        case OperationalError() | InterfaceError() | TimeoutError():
            return _away(gettext("The database does not answer."), "database_away")
        case DBAPIError() if error.connection_invalidated:
            return _away(gettext("The database went away."), "database_away")
        case redis.RedisError() if queue.cannot_write(error):
            return DiskFull(gettext("The message broker cannot write: its disk is full."))
        case redis.ConnectionError() | redis.TimeoutError():
            return _away(gettext("The message broker does not answer."), "broker_away")
        case OSError() if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return DiskFull(
                gettext("The disk of the studio is full."), hint=gettext("Delete what is no longer needed under Runs, Models or Datasets.")
            )
        case _:
            return StudioError(
                gettext("Something went wrong in the studio."), hint=gettext("Try again; if it stays, look for the request id in the log.")
            )


def _away(message: str, code: str) -> Unavailable:
    return Unavailable(message, hint=gettext("Nothing is lost. Wait a moment and try again."), code=code)


def _bad_field(found: Any) -> BadField:
    """The first wrong field, in words, with the names of the others."""
    first = found[0]
    name = _field(first)
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        message = gettext("The body is not valid JSON: %(reason)s.", reason=reason)
        return BadField(message, hint=gettext("Send a JSON object."), code="invalid_json")
    others = len({_field(one) for one in found} - {name})
    more = " " + ngettext("(%(num)s more field is wrong.)", "(%(num)s more fields are wrong.)", others) if others else ""
    if name is None and first["type"] == "missing":
        return BadField(gettext("The body is empty."), hint=gettext("Send a JSON object."), code="missing_required_parameter")
    text = errors.plain(str(first["msg"]))
    if first["type"] == "missing":
        message = gettext("%(field)s is missing.", field=name) + more
        return BadField(message, param=name, code="missing_required_parameter", hint=gettext("Send this field too."))
    return BadField((f"{name}: {text}" if name else gettext("The body: %(reason)s", reason=text)) + more, param=name)


def _field(error: Mapping[str, Any]) -> str | None:
    source, *inside = error["loc"] or ("",)
    return errors.field_path(inside if source in ("body", "query", "path", "header", "cookie") else error["loc"])[:200] or None


def _from_http(error: HTTPException) -> StudioError:
    words = HTTPStatus(error.status_code).phrase
    message = gettext("Page not found.") if error.status_code == 404 else f"{error.detail or words}".rstrip(".") + "."
    kind = next((k for k in _every(StudioError) if k.status == error.status_code), StudioError)
    fault = TooMany(message) if kind is TooMany else kind(message, hint=gettext(_WAYS_OUT.get(error.status_code, "")))
    fault.status = error.status_code
    if kind is StudioError and error.status_code < 500:
        fault.type, fault.code = "invalid_request_error", words.lower().replace(" ", "_")
    fault.headers = dict(error.headers or {})
    return fault


def _every(kind: type[StudioError]) -> Iterator[type[StudioError]]:
    for child in kind.__subclasses__():
        yield child
        yield from _every(child)


def answer(request: Request, fault: StudioError) -> Response:
    if is_program(request):
        return JSONResponse({"error": fault.as_json()}, status_code=fault.status, headers=_headers(fault))
    if isinstance(fault, NotSignedIn) and request.url.path != "/sign-in":
        return _to_sign_in(request)
    return _page(request, fault)


def _headers(fault: StudioError) -> Mapping[str, str]:
    headers: dict[str, str] = dict(getattr(fault, "headers", {}))
    if isinstance(fault, errors.Conflict):
        headers["x-should-retry"] = "false"  # the client retries every 409 by itself, and a real conflict stays one
    if isinstance(fault, TooMany):
        headers["retry-after"] = str(max(1, round(fault.retry_after_seconds)))
    if fault.status == 503:
        headers["retry-after"] = "2"
    return headers


def _to_sign_in(request: Request) -> Response:
    here = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    target = f"/sign-in?next={quote(here, safe='/')}" if request.method == "GET" and here != "/" else "/sign-in"
    if request.headers.get("hx-request"):
        return Response(status_code=401, headers={"hx-redirect": "/sign-in"})
    return RedirectResponse(target, status_code=303)


def _page(request: Request, fault: StudioError) -> Response:
    from app.web.templates import render

    whole = not request.headers.get("hx-request")
    if fault.code != "database_away":  # it would only wait for the database again
        _find_user(request)
    try:
        response: Response = render(request, "error.html" if whole else "parts/error.html", status_code=fault.status, fault=fault)
    except Exception as error:  # an error of the error page itself must not hide the first one
        log.error("error page", exc_info=error)
        response = PlainTextResponse(f"{fault}\n\nrequest {request.state.id}\n", fault.status)
    response.headers.update(_headers(fault))
    return response


def _find_user(request: Request) -> None:
    """Identify the user, so that the error page keeps its menu: for an unknown path no dependency has run yet."""
    from app.web import navigation
    from app.web.auth import identify

    if not hasattr(request.state, "user"):
        try:
            request.state.user = user = identify(request)
            request.state.notes = navigation.notes(user) if user else navigation.MenuState()
        except Exception:  # the page must be shown whatever is broken
            request.state.user = None
