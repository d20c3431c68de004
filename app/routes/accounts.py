"""Sign-in by link or password, sign-out, and the color theme."""

from __future__ import annotations

import uuid
from typing import Annotated, Literal

from fastapi import APIRouter, Form, Request, Response
from fastapi.responses import RedirectResponse
from sqlalchemy import select
from starlette.concurrency import run_in_threadpool

from app.db import Db, transaction
from app.errors import StudioError
from app.settings import get_settings
from app.tables import User
from app.web import auth, passwords, two_step
from app.web.auth import CurrentUser
from app.web.templates import render

pages = APIRouter()


def safe_next(path: str) -> str:
    """The path to redirect to, or `/`. Only paths of this studio are allowed: `//host` and `/\\host` would lead to another site."""
    inside = path.startswith("/") and not path.startswith(("//", "/\\")) and not any(ord(c) < 32 for c in path)
    return path if inside else "/"


@pages.get("/sign-in")
def sign_in_page(request: Request, next: str = "/") -> Response:
    if auth.identify(request):
        return RedirectResponse(safe_next(next), 303)
    return _form(request, next)


def _form(request: Request, next: str, fault: StudioError | None = None, name: str = "") -> Response:
    settings = get_settings()
    with transaction() as session:
        any_password = session.scalars(select(User.id).where(User.password_hash.is_not(None)).limit(1)).first() is not None
    status = fault.status if fault else 200
    values = {
        "next": safe_next(next),
        "fault": fault,
        "passwords": any_password,
        "name": name or settings.admin_name,
        "provider": settings.oidc_name if settings.oidc_issuer else "",
    }
    return render(request, "sign_in.html", status_code=status, **values)


@pages.post("/sign-in")
async def sign_in(
    request: Request, name: Annotated[str, Form()] = "", password: Annotated[str, Form()] = "", next: Annotated[str, Form()] = "/"
) -> Response:
    """Sign in with a password. The first five failures are not delayed."""
    try:
        given = password[: passwords.MAX_LENGTH]
        user_id = await auth.check_password(name.strip()[:80], given, auth.address_of(request), auth.known_browser(request))
        return await run_in_threadpool(let_in, request, user_id, next)
    except StudioError as fault:
        return _with_wait(await run_in_threadpool(_form, request, next, fault, name), fault)


def _with_wait(response: Response, fault: StudioError) -> Response:
    if seconds := getattr(fault, "retry_after_seconds", None):
        response.headers["retry-after"] = str(round(seconds))
    return response


def let_in(request: Request, user_id: uuid.UUID, next: str) -> Response:
    """Sign in whose password was right, or ask for the code first."""
    response = RedirectResponse(safe_next(next), 303)
    with transaction() as session:
        user = session.get_one(User, user_id)
        if two_step.is_on(session, user_id):
            return _code_form(request, two_step.ticket_for(user_id, user.password_hash), next)
        auth.open_session(session, request, response, user)
    return response


def _code_form(request: Request, ticket: str, next: str, fault: StudioError | None = None) -> Response:
    status = fault.status if fault else 200
    return render(request, "sign_in_code.html", status_code=status, ticket=ticket, next=safe_next(next), fault=fault)


@pages.post("/sign-in/code")
def sign_in_with_code(
    request: Request,
    ticket: Annotated[str, Form(max_length=500)] = "",
    code: Annotated[str, Form(max_length=40)] = "",
    next: Annotated[str, Form()] = "/",
) -> Response:
    """The second step: a code of the app, or a recovery code. Wrong ones count as wrong passwords do."""
    try:
        with transaction() as session:
            user = two_step.holder_of(session, ticket)
    except StudioError as fault:
        return _form(request, next, fault)
    try:
        tries = two_step.tries_of(user, request)
        response = RedirectResponse(safe_next(next), 303)
        with transaction() as session:
            two_step.take(session, user.id, code)
            auth.open_session(session, request, response, user)
        tries.forget()
        return response
    except StudioError as fault:
        return _with_wait(_code_form(request, ticket, next, fault), fault)


@pages.get("/sign-in/{token}")
def sign_in_by_link(request: Request, token: str, session: Db) -> Response:
    """Sign in with the link that `luthier up` prints. It works once."""
    try:
        user = auth.use_link(session, token)
    except StudioError:
        if auth.identify(request):
            return RedirectResponse("/", 303)  # the link was opened again in a browser that is signed in already
        raise
    response = RedirectResponse("/", 303)
    auth.open_session(session, request, response, user)
    return response


@pages.post("/sign-out")
def sign_out(request: Request, user: CurrentUser, session: Db) -> Response:
    response = RedirectResponse("/sign-in", 303)
    auth.close_session(session, request, response)
    return response


@pages.post("/theme")
def theme(request: Request, user: CurrentUser, theme: Annotated[Literal["", "light", "dark"], Form()] = "") -> Response:
    """The theme is stored in a cookie, so that the page is rendered with it and does not change color after it has loaded."""
    return _back_with(request, "luthier_theme", theme)


@pages.post("/language")
def language(request: Request, language: Annotated[Literal["", "en", "de", "zh"], Form()] = "") -> Response:
    """Kept in a cookie, like the theme, so that the sign-in page has it too; empty: what the browser asks for."""
    return _back_with(request, "luthier_language", language)


def _back_with(request: Request, cookie: str, value: str) -> Response:
    """Back to the page the form was on, which is made anew with the choice."""
    back = request.headers.get("referer", "/")
    path = safe_next("/" + back.split("/", 3)[3]) if back.count("/") >= 3 else "/"
    response = RedirectResponse(path, 303)
    response.set_cookie(cookie, value, max_age=365 * 86_400, samesite="lax", secure=auth.secure(request), path="/")
    return response
