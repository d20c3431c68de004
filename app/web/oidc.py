"""Sign-in with an account of an OpenID Connect provider: authorization code with PKCE, state and nonce, and an identity token whose
signature, issuer, audience, times and nonce are checked.

An identity (issuer and subject) belongs to one account. It is made by an invitation, or connected by somebody who is signed in; an
e-mail address connects nothing, since a provider may let people choose it.

The provider is the one that LUTHIER_OIDC_ISSUER names; all its addresses come from that issuer's own document, over https or from
this machine. (https://openid.net/specs/openid-connect-core-1_0.html, sections 3.1 and 15.1; RFC 7636, RFC 9700)
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
import uuid
from base64 import urlsafe_b64encode
from typing import Any, NamedTuple
from urllib.parse import quote_plus, urlencode, urlsplit

from fastapi import Request, Response
from fastapi.responses import RedirectResponse
from itsdangerous import BadData, URLSafeTimedSerializer
from sqlalchemy import func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app.errors import BadField, Conflict, Forbidden, NotFound, Unavailable
from app.kit.addresses import is_loopback
from app.kit.json_safe import storable
from app.kit.secret import secret
from app.languages import gettext
from app.settings import get_settings
from app.tables import Identity, User
from app.web import auth, people
from app.web.templates import public_address

SECONDS = 600
"""How long a sign-in at the provider may take."""
ASKING_SECONDS, DOCUMENT_SECONDS = 8.0, 3600.0
LEEWAY = 60
ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "EdDSA"]
"""Signatures with a public key. `none` and those with a shared secret are not among them."""
BEGIN, CALLBACK = "/oidc/begin", "/oidc/callback"
_documents: dict[str, tuple[float, dict[str, Any]]] = {}


class SignInBegun(NamedTuple):
    """What a sign-in that was begun must end with, kept in a signed cookie of the browser."""

    state: str
    nonce: str
    verifier: str
    next: str
    invitation: str  # token of the invitation it answers; empty for none
    connect: bool  # whether the identity is to be connected to the account that is signed in


class Claims(NamedTuple):
    """What the provider says of a person. Only `issuer` and `subject` decide who it is."""

    issuer: str
    subject: str
    name: str
    email: str


def configured() -> bool:
    return get_settings().oidc_issuer is not None


def _serializer() -> URLSafeTimedSerializer:
    return URLSafeTimedSerializer(secret(), salt="oidc")


def _cookie(request: Request) -> str:
    return auth.cookie_name(request, "_oidc")


def begin(request: Request, next: str, invitation: str = "", connect: bool = False) -> Response:
    """The redirect to the provider. Raises NotFound where no provider is configured, and
    Unavailable where it cannot be asked."""
    document = _document()
    begun = SignInBegun(secrets.token_urlsafe(24), secrets.token_urlsafe(24), secrets.token_urlsafe(48), next, invitation, connect)
    asked = {
        "response_type": "code",
        "client_id": get_settings().oidc_client_id,
        "redirect_uri": f"{public_address(request)}{CALLBACK}",
        "scope": "openid profile email",
        "state": begun.state,
        "nonce": begun.nonce,
        "code_challenge": urlsafe_b64encode(hashlib.sha256(begun.verifier.encode()).digest()).rstrip(b"=").decode(),
        "code_challenge_method": "S256",
    }
    where = str(document["authorization_endpoint"])
    url = f"{where}{'&' if '?' in where else '?'}{urlencode(asked)}"
    response = RedirectResponse(url, 303)
    kept = str(_serializer().dumps(list(begun)))
    response.set_cookie(_cookie(request), kept, max_age=SECONDS, httponly=True, samesite="lax", secure=auth.secure(request), path="/")
    return response


def end(request: Request) -> tuple[SignInBegun, Claims]:
    """What was begun in this browser, and whom the provider says it is. Raises Forbidden for anything that does not fit together, and
    Unavailable where the provider cannot be asked."""
    try:
        begun = SignInBegun(*_serializer().loads(request.cookies.get(_cookie(request), ""), max_age=SECONDS))
    except (BadData, TypeError, ValueError):
        raise _refused(gettext("The sign-in was refused: it was begun in another browser, or more than ten minutes ago.")) from None
    given = request.query_params
    if not hmac.compare_digest(begun.state.encode(), given.get("state", "").encode()):
        raise _refused(gettext("The sign-in was refused: its state is another one's."))
    if reason := given.get("error"):
        raise _refused(gettext("The sign-in was refused: the provider says %(reason)s.", reason=storable(reason)[:80]))
    document = _document()
    if (issuer := given.get("iss")) is not None and issuer != document["issuer"]:
        raise _refused(gettext("The sign-in was refused: it comes from another provider."))
    return begun, _claims(request, document, begun, given.get("code", ""))


def _claims(request: Request, document: dict[str, Any], begun: SignInBegun, code: str) -> Claims:
    settings = get_settings()
    asked = {"grant_type": "authorization_code", "code": code, "redirect_uri": f"{public_address(request)}{CALLBACK}"}
    asked |= {"client_id": settings.oidc_client_id, "code_verifier": begun.verifier}
    basic = (quote_plus(settings.oidc_client_id), quote_plus(settings.oidc_client_secret)) if settings.oidc_client_secret else None
    token = _asked(str(document["token_endpoint"]), data=asked, auth=basic)
    if "error" in token:
        raise _refused(gettext("The sign-in was refused: the provider says %(reason)s.", reason=storable(str(token["error"]))[:80]))
    found = _verified(document, str(token.get("id_token") or ""))
    audience = found.get("aud")
    client_id = get_settings().oidc_client_id
    if audience != client_id and not (isinstance(audience, list) and client_id in audience and found.get("azp", client_id) == client_id):
        raise _refused(gettext("The sign-in was refused: its token is for another program."))
    if not hmac.compare_digest(str(found.get("nonce", "")).encode(), begun.nonce.encode()):
        raise _refused(gettext("The sign-in was refused: its nonce is another one's."))
    subject = found.get("sub")
    if not isinstance(subject, str) or not 0 < len(subject) <= 255:
        raise _refused(gettext("The sign-in was refused: its token names nobody."))
    name = found.get("preferred_username") or found.get("name") or found.get("email") or subject
    return Claims(document["issuer"], subject, storable(str(name))[:80], storable(str(found.get("email") or ""))[:200])


def _verified(document: dict[str, Any], token: str) -> dict[str, Any]:
    """The claims of an identity token whose signature, issuer and times are right."""
    from joserfc import jwt
    from joserfc.errors import JoseError
    from joserfc.jwk import KeySet

    try:
        keys = KeySet.import_key_set(_fetch(document["jwks_uri"]))  # type: ignore[arg-type]  # as it came
        found = jwt.decode(token, keys, algorithms=ALGORITHMS)
        must: Any = {"essential": True}
        issuer: Any = {"essential": True, "value": document["issuer"]}
        registry = jwt.JWTClaimsRegistry(leeway=LEEWAY, iss=issuer, exp=must, iat=must, aud=must, sub=must)
        registry.validate(found.claims)
    except (JoseError, ValueError, TypeError, KeyError) as error:
        raise _refused(gettext("The sign-in was refused: its token is not valid (%(reason)s).", reason=type(error).__name__)) from None
    return dict(found.claims)


def _refused(message: str) -> Forbidden:
    return Forbidden(message, hint=gettext("Begin again from the sign-in page."), code="oidc_refused")


# The provider -----------------------------------------------------------------------------------------------------------


def _document() -> dict[str, Any]:
    """The provider's own description of itself, asked once an hour."""
    issuer = get_settings().oidc_issuer
    if issuer is None:
        raise NotFound(gettext("No provider is configured."), hint=gettext("Set LUTHIER_OIDC_ISSUER."))
    at, known = _documents.get(issuer, (0.0, {}))
    if known and time.monotonic() - at < DOCUMENT_SECONDS:
        return known
    found = _fetch(f"{issuer.rstrip('/')}/.well-known/openid-configuration")
    if found.get("issuer") != issuer:
        raise Unavailable(
            gettext("The provider calls itself %(name)s, not %(wanted)s.", name=repr(str(found.get("issuer"))[:120]), wanted=repr(issuer)),
            hint=gettext("Set LUTHIER_OIDC_ISSUER to its own name."),
        )
    for name in ("authorization_endpoint", "token_endpoint", "jwks_uri"):
        _check_address(str(found.get(name) or ""))
    _documents[issuer] = time.monotonic(), found
    return found


def _fetch(url: str) -> dict[str, Any]:
    found = _asked(url)
    if "error" in found:
        message = gettext("The provider does not answer as one.")
        raise Unavailable(message, hint=gettext("Check LUTHIER_OIDC_ISSUER."), code="oidc_unreachable")
    return found


def _asked(url: str, data: dict[str, str] | None = None, auth: tuple[str, str] | None = None) -> dict[str, Any]:
    """The JSON that an address of the provider answers with, to a form where there is one; an error of its own has the key `error`."""
    import httpx

    _check_address(url)
    try:
        answer = httpx.request("POST" if data else "GET", url, data=data, auth=auth, timeout=ASKING_SECONDS, follow_redirects=False)
        if answer.status_code not in (200, 400, 401):
            answer.raise_for_status()
        found = answer.json()
        if not isinstance(found, dict):
            raise ValueError("it is no object")
    except (httpx.HTTPError, ValueError) as error:
        raise _unreachable(error) from None
    return found


def _check_address(url: str) -> None:
    """Raises Unavailable for an address that others on the way could read."""
    parts = urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(parts.hostname or "")):
        message = gettext("The provider has the address %(address)s, which is not https.", address=repr(url[:120]))
        raise Unavailable(message, hint=gettext("Choose a provider that is."))


def _unreachable(error: Exception) -> Unavailable:
    return Unavailable(
        gettext("The sign-in provider cannot be reached (%(reason)s).", reason=type(error).__name__),
        hint=gettext("Try again in a moment, or sign in by password or link."),
        code="oidc_unreachable",
    )


# Identities -------------------------------------------------------------------------------------------------------------


def account_of(session: Session, claims: Claims) -> User | None:
    """The account of an identity; None where it has none, or a disabled one."""
    query = select(User).join(Identity, Identity.user_id == User.id).where(User.disabled_at.is_(None))
    user = session.scalar(query.where(Identity.issuer == claims.issuer, Identity.subject == claims.subject))
    if user is not None:
        mine = update(Identity).where(Identity.issuer == claims.issuer, Identity.subject == claims.subject)
        session.execute(mine.values(last_used_at=func.clock_timestamp(), email=claims.email))
    return user


def connect(session: Session, user: User, claims: Claims) -> None:
    """Let an identity sign in to an account from now on. Raises Conflict where it belongs to another."""
    made = insert(Identity).values(id=uuid.uuid4(), user_id=user.id, issuer=claims.issuer, subject=claims.subject, email=claims.email)
    session.execute(made.on_conflict_do_nothing(index_elements=["issuer", "subject"]))
    owner = session.scalar(select(Identity.user_id).where(Identity.issuer == claims.issuer, Identity.subject == claims.subject))
    if owner != user.id:
        message = gettext("That sign-in belongs to another account of this studio.")
        raise Conflict(message, hint=gettext("Disconnect it there first."), code="identity_taken")


def accept(session: Session, token: str, claims: Claims) -> User:
    """The account of an invitation, made for an identity under the name that the provider gives it, with a number where it is taken."""
    plain = "".join(c if c.isalnum() or c in ".-_@+'" else " " for c in claims.name)
    name = " ".join(plain.split())[:70] or "person"
    for number in range(1, 100):
        try:
            user = people.accept(session, token, name if number == 1 else f"{name} {number}", None)
        except Conflict:
            continue
        connect(session, user, claims)
        return user
    message = gettext("No name is free for this account.")
    raise BadField(message, hint=gettext("Create the account with a name and a password instead."))


def identities(session: Session, user: User) -> list[Identity]:
    return list(session.scalars(select(Identity).where(Identity.user_id == user.id).order_by(Identity.created_at)))


def disconnect(session: Session, user: User, identity_id: uuid.UUID) -> None:
    """Raises NotFound, and Conflict for the only way to sign in to an account."""
    found = session.scalar(select(Identity).where(Identity.id == identity_id, Identity.user_id == user.id))
    if found is None:
        raise NotFound(gettext("No such sign-in of yours."), hint=gettext("Reload the page."))
    if user.password_hash is None and len(identities(session, user)) == 1:
        message = gettext("It is the only way to sign in to this account.")
        raise Conflict(message, hint=gettext("Set a password first."), code="last_sign_in")
    session.delete(found)
    session.flush()
