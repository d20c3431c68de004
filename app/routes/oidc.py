"""Sign-in with an OpenID Connect provider: to it, back from it, and which of its accounts are connected."""

from __future__ import annotations

import uuid

from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse

from app.db import Db, transaction
from app.errors import Forbidden
from app.languages import gettext
from app.routes.accounts import let_in, safe_next
from app.web import auth, oidc
from app.web.auth import CurrentUser
from app.web.policy import ROLES
from app.web.templates import flash

pages = APIRouter()
ACCOUNT = "/settings/account"


@pages.get(oidc.BEGIN)
def begin(request: Request, next: str = "/", invitation: str = "") -> Response:
    return oidc.begin(request, safe_next(next), invitation[:200])


@pages.post(f"{ACCOUNT}/identities")
def connect(request: Request, user: CurrentUser) -> Response:
    """Connect an account of the provider to the one that is signed in."""
    return oidc.begin(request, ACCOUNT, connect=True)


@pages.post(f"{ACCOUNT}/identities/{{identity_id}}/remove")
def disconnect(request: Request, user: CurrentUser, session: Db, identity_id: uuid.UUID) -> Response:
    oidc.disconnect(session, user, identity_id)
    flash(request, gettext("Disconnected."))
    return RedirectResponse(ACCOUNT, 303)


@pages.get(oidc.CALLBACK)
def callback(request: Request) -> Response:
    begun, claims = oidc.end(request)
    with transaction() as session:
        if begun.connect:
            known = auth.identify(request)
            if known is None or known.role not in ROLES:  # a guest of a shared project has no account
                raise Forbidden(gettext("You were signed out in the meantime."), hint=gettext("Sign in, and connect it again."))
            oidc.connect(session, known, claims)
            flash(request, gettext("Connected."))
            return RedirectResponse(ACCOUNT, 303)
        user = oidc.account_of(session, claims)
        if user is None and begun.invitation:
            user = oidc.accept(session, begun.invitation, claims)
        if user is None:
            raise Forbidden(
                gettext("Nobody here has this sign-in."),
                hint=gettext("Ask an admin for an invitation, or sign in another way and connect it under Settings, Account."),
                code="unknown_identity",
            )
        key = user.id
    return let_in(request, key, begun.next)
