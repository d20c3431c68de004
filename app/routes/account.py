"""One's own account: password, sessions and two-step sign-in."""

from __future__ import annotations

import uuid
from typing import Annotated, Any

from fastapi import APIRouter, Form, Request, Response
from fastapi.responses import RedirectResponse
from starlette.concurrency import run_in_threadpool

from app import limits
from app.db import Db, transaction
from app.errors import Conflict, NotFound, StudioError
from app.languages import gettext
from app.settings import get_settings
from app.tables import User
from app.web import auth, oidc, passwords, sessions, two_step
from app.web.auth import CurrentUser
from app.web.templates import flash, render

pages = APIRouter()
PAGE = "/settings/account"


@pages.get(PAGE)
def account(request: Request, user: CurrentUser, session: Db) -> Response:
    return _page(request, user, session)


def _page(
    request: Request, user: User, session: Db, fault: StudioError | None = None, section: str = "", recovery: list[str] | None = None
) -> Response:
    setup = two_step.find(session, user)
    values: dict[str, Any] = {
        "fault": fault,
        "section": section,
        "recovery": recovery,
        "provider": get_settings().oidc_name if oidc.configured() else "",
        "identities": oidc.identities(session, user),
        "setup": setup,
        "setup_text": two_step.setup_text(setup) if setup and not setup.confirmed_at else "",
        "setup_uri": two_step.setup_uri(setup, user) if setup and not setup.confirmed_at else "",
        "num_recovery": len(setup.recovery) if setup else 0,
        "from_setting": _from_setting(user),
        "usage": limits.of_person(session, user.id),
        "project_usage": limits.of_project(session, user.project_id),
        "sessions": [(one, sessions.browser_name(one.browser), sessions.is_this(request, one)) for one in sessions.list_(session, user)],
    }
    return render(request, "account.html", status_code=fault.status if fault else 200, **values)


def _from_setting(user: User) -> bool:
    settings = get_settings()
    return bool(settings.admin_password) and user.name == settings.admin_name


@pages.post(f"{PAGE}/password")
async def change_password(
    request: Request, user: CurrentUser, current: Annotated[str, Form()] = "", password: Annotated[str, Form()] = ""
) -> Response:
    """A new password ends every other session. The one in force is asked for, and wrong ones count as at sign-in."""
    try:
        if _from_setting(user):
            message = gettext("This account's password is the setting LUTHIER_ADMIN_PASSWORD.")
            raise Conflict(message, hint=gettext("Change it there and start the studio again."))
        if user.password_hash is not None:
            await auth.check_password(user.name, current[: passwords.MAX_LENGTH], auth.address_of(request), auth.known_browser(request))
        made = await passwords.new_hash(password)
        await run_in_threadpool(_store_password, request, user, made)
    except StudioError as fault:
        return await run_in_threadpool(_with_fault, request, user, fault, "password")
    flash(request, gettext("Your password is changed, and you are signed out everywhere else."))
    return RedirectResponse(PAGE, 303)


def _store_password(request: Request, user: User, made: str) -> None:
    with transaction() as session:
        session.get_one(User, user.id).password_hash = made
        sessions.end_all(session, user.id, but=request)


def _with_fault(request: Request, user: User, fault: StudioError, section: str) -> Response:
    with transaction() as session:
        response = _page(request, user, session, fault, section)
    if seconds := getattr(fault, "retry_after_seconds", None):
        response.headers["retry-after"] = str(round(seconds))
    return response


@pages.post(f"{PAGE}/sessions/{{session_id}}/end")
def end_session(request: Request, user: CurrentUser, session: Db, session_id: str) -> Response:
    try:
        key = uuid.UUID(session_id)
    except ValueError:
        raise NotFound(gettext("No such session.")) from None
    sessions.end(session, user, key)
    flash(request, gettext("That browser is signed out."))
    return RedirectResponse(f"{PAGE}#sessions", 303)


@pages.post(f"{PAGE}/sign-out-everywhere")
def sign_out_everywhere(request: Request, user: CurrentUser, session: Db) -> Response:
    response = RedirectResponse("/sign-in", 303)
    sessions.end_all(session, user.id)
    auth.close_session(session, request, response)
    return response


@pages.post(f"{PAGE}/two-step")
def begin_two_step(request: Request, user: CurrentUser, session: Db) -> Response:
    two_step.begin(session, user)
    return RedirectResponse(f"{PAGE}#two-step", 303)


@pages.post(f"{PAGE}/two-step/confirm")
def confirm_two_step(request: Request, user: CurrentUser, code: Annotated[str, Form(max_length=40)] = "") -> Response:
    """The response is the page itself, because the recovery codes are shown once and stored nowhere."""
    try:
        tries = two_step.tries_of(user, request)
        with transaction() as session:
            recovery = two_step.confirm(session, user, code)
        tries.forget()
    except StudioError as fault:
        return _with_fault(request, user, fault, "two-step")
    with transaction() as session:
        return _page(request, user, session, section="two-step", recovery=recovery)


@pages.post(f"{PAGE}/two-step/off")
def two_step_off(request: Request, user: CurrentUser, code: Annotated[str, Form(max_length=40)] = "") -> Response:
    try:
        tries = two_step.tries_of(user, request)
        with transaction() as session:
            two_step.take(session, user.id, code)
            two_step.turn_off(session, user.id)
        tries.forget()
    except StudioError as fault:
        return _with_fault(request, user, fault, "two-step")
    flash(request, gettext("Two-step sign-in is off."), "warn")
    return RedirectResponse(f"{PAGE}#two-step", 303)
