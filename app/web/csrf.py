"""The token that every form carries: a cookie alone may not change anything."""

from __future__ import annotations

import hmac
import secrets

from fastapi import Request

from app.errors import Forbidden
from app.kit.secret import secret
from app.languages import gettext
from app.web.auth import ON_BEHALF, SAFE, cookie_name, given_key, is_public, sha256


def csrf_token(request: Request) -> str:
    """A token bound to this browser session. Its salt differs every time, so that compressed pages do not leak it."""
    token = request.cookies.get(cookie_name(request))
    if not token:
        return ""
    salt = secrets.token_hex(8)
    return f"{salt}.{_csrf_mark(token, salt)}"


def _csrf_mark(token: str, salt: str) -> str:
    return hmac.new(secret(), f"csrf|{salt}|{sha256(token)}".encode(), "sha256").hexdigest()


def csrf_holds(request: Request, given: str) -> bool:
    token = request.cookies.get(cookie_name(request), "")
    salt, _, mark = given.partition(".")
    return bool(token and mark and given.isascii()) and hmac.compare_digest(mark, _csrf_mark(token, salt))


async def check_csrf(request: Request) -> None:
    """The second dependency of the whole app: a cookie alone may not change anything.

    The token comes in the header `x-csrf-token`, in the form field `csrf_token`, or, for a multipart form that the route reads as
    a stream, in the query (`<form action="/datasets?{{ csrf_query() }}">`).
    """
    if request.method in SAFE or given_key(request) or is_public(request) or ON_BEHALF in request.scope:
        return
    given = request.headers.get("x-csrf-token") or request.query_params.get("csrf_token") or await _form_token(request)
    if not csrf_holds(request, given):
        raise Forbidden(
            gettext("This form did not come from an open page of yours, or the page is too old."),
            hint=gettext("Go back, reload the page and send it again."),
            code="csrf",
        )


async def _form_token(request: Request) -> str:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    parsed = getattr(request, "_form", None) is not None  # FastAPI parsed the form already, because the route declares its fields
    if kind != "application/x-www-form-urlencoded" and not parsed:
        return ""
    value = (await request.form()).get("csrf_token", "")
    return value if isinstance(value, str) else ""
