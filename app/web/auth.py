"""Authentication: users, sign-in links, passwords, browser sessions and API keys.

Secrets are random and long, so their SHA-256 is stored and compared; passwords are short, so they get argon2id. Every route
requires `sign_in`, which `app.main` sets as a dependency of the whole app; the only exceptions are the paths in `PUBLIC`. A
cookie is sent by the browser even when another site caused the request, so every change with a cookie must also carry a token
only our own pages know (`check_csrf`). An API key needs none: no browser adds it.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import uuid
from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Annotated, NamedTuple

from fastapi import Depends, Request, Response
from itsdangerous import BadData, URLSafeSerializer
from sqlalchemy import ColumnElement, Row, delete, func, or_, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from app.db import transaction
from app.errors import BadField, Forbidden, NotFound, NotSignedIn
from app.settings import get_settings
from app.tables import ApiKey, BrowserSession, SignInLink, User
from app.web import passwords, policy

PUBLIC = frozenset({"/healthz", "/readyz", "/metrics", "/sign-in", "/sign-in/code", "/sign-in/{token}", "/invitation/{token}"})
"""Routes that need no account. `/metrics` has its own check: signed in, or from this machine."""

SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
SESSION_DAYS = 30
KNOWN_DAYS = 400
LINK_MINUTES = 60
MAX_KEY_DAYS = 3650


# Secrets --------------------------------------------------------------------------------------------------------------


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def secret(name: str = "session") -> bytes:
    """A random secret of this studio, created at the first start and readable by its owner alone (0600)."""
    path = get_settings().folder("secrets") / f"{name}.key"
    if not path.exists():
        # Two processes may start at once: each writes a draft, and only one of them gets the name.
        draft = path.with_suffix(f".{os.getpid()}")
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(32))
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
        draft.unlink()
    return path.read_bytes()


def studio_mark() -> str:
    """8 hex digits in the names of this studio's cookies. Cookies ignore ports, so two studios at one host name, as at the ends
    of two tunnels, would otherwise overwrite each other's. The secret distinguishes them even where the folder's path does not."""
    return hmac.new(secret(), b"cookies", "sha256").hexdigest()[:8]


# People ---------------------------------------------------------------------------------------------------------------


def first_user(session: Session) -> User:
    """The account that owns the studio, an admin created at the first start; its password follows LUTHIER_ADMIN_PASSWORD.

    Another password ends its browser sessions.
    """
    settings = get_settings()
    made = insert(User).values(id=uuid.uuid4(), name=settings.admin_name, role="admin")
    session.execute(made.on_conflict_do_nothing(index_elements=["name"]))
    user = session.scalars(select(User).where(User.name == settings.admin_name)).one()
    password = settings.admin_password
    if password and not passwords.matches(password, user.password_hash):
        if user.password_hash is not None:
            session.execute(delete(BrowserSession).where(BrowserSession.user_id == user.id))
        user.password_hash = passwords.hash_of(password)
    return user


def new_sign_in_link(session: Session, user: User, minutes: float = LINK_MINUTES) -> str:
    """A path that signs `user` in once within `minutes`. Only the hash of its token is stored."""
    token = secrets.token_urlsafe(32)
    expires = func.clock_timestamp() + timedelta(minutes=minutes)
    session.add(SignInLink(token_sha256=sha256(token), user_id=user.id, expires_at=expires))
    session.flush()
    return f"/sign-in/{token}"


def use_link(session: Session, token: str) -> User:
    """The user of a sign-in link, which is used up by this. Raises NotFound when it is unknown, used or too old."""
    spent = (
        update(SignInLink)
        .where(SignInLink.token_sha256 == sha256(token), SignInLink.used_at.is_(None), SignInLink.expires_at > func.clock_timestamp())
        .where(SignInLink.user_id.in_(select(User.id).where(User.disabled_at.is_(None))))
        .values(used_at=func.clock_timestamp())
        .returning(SignInLink.user_id)
    )
    user_id = session.scalar(spent)
    if user_id is None:
        raise NotFound("This sign-in link was used already, or it is too old.", hint="Run `luthier link` for a new one.")
    return session.get_one(User, user_id)


async def check_password(name: str, password: str, address: str, browser: str | None = None) -> uuid.UUID:
    """The id of the user with this name and password. `browser` is the cookie of `known_browser`.

    Raises NotSignedIn, or TooMany where too many attempts were made before or are being checked.
    """
    tries, user_id, known = await run_in_threadpool(_begin_try, name, address, browser)
    if not await passwords.judge(password, known) or user_id is None:
        raise NotSignedIn("That name and password do not match.", hint="Try again, or use a sign-in link from `luthier link`.")
    await run_in_threadpool(tries.forget)
    return user_id


def _begin_try(name: str, address: str, browser: str | None) -> tuple[passwords.Tries, uuid.UUID | None, str | None]:
    """The counts of one attempt, and the user and hash to check the password against."""
    with transaction() as session:
        query = select(User.id, User.password_hash).where(User.name == name, User.disabled_at.is_(None))
        found = session.execute(query).one_or_none()
    user_id, known = found or (None, None)
    tries = passwords.Tries(name, address, known_to(user_id, browser) if user_id and browser else None)
    tries.take()
    return tries, user_id, known


# Browser sessions -----------------------------------------------------------------------------------------------------


def secure(request: Request) -> bool:
    """Whether the browser uses https, to us or to the proxy in front of us."""
    return request.url.scheme == "https" or (get_settings().public_url or "").startswith("https://")


def cookie_name(request: Request, kind: str = "") -> str:
    """Browsers refuse `__Host-` cookies over plain http, which 127.0.0.1 uses."""
    return f"{'__Host-' if secure(request) else ''}luthier{kind}_{studio_mark()}"


def known_browser(request: Request) -> str | None:
    """The cookie that says this browser was signed in before. It grants nothing: it only gives its password attempts a count of
    their own."""
    return request.cookies.get(cookie_name(request, "_known"))


def known_to(user_id: uuid.UUID, browser: str) -> str | None:
    """The key of the attempts from a browser in which this user was signed in before; None for any other."""
    try:
        owner, browser_id = _known_signer().loads(browser)
    except (BadData, ValueError, TypeError):
        return None
    return str(browser_id) if owner == user_id.hex else None


def _known_signer() -> URLSafeSerializer:
    return URLSafeSerializer(secret(), salt="known browser")


def open_session(session: Session, request: Request, response: Response, user: User) -> None:
    """Sign a browser in, always with a new session, so that a token planted before the sign-in is worthless (session fixation)."""
    close_session(session, request)
    token = secrets.token_urlsafe(32)
    expires = func.clock_timestamp() + timedelta(days=SESSION_DAYS)
    browser = request.headers.get("user-agent", "").replace("\0", "")[:300]
    session.add(
        BrowserSession(token_sha256=sha256(token), user_id=user.id, expires_at=expires, address=address_of(request), browser=browser)
    )
    session.execute(delete(BrowserSession).where(BrowserSession.expires_at < func.clock_timestamp()))
    known = str(_known_signer().dumps([user.id.hex, secrets.token_hex(8)]))
    for name, value, days in ((cookie_name(request), token, SESSION_DAYS), (cookie_name(request, "_known"), known, KNOWN_DAYS)):
        response.set_cookie(name, value, max_age=days * 86_400, httponly=True, samesite="lax", secure=secure(request), path="/")


def address_of(request: Request) -> str:
    """The network address that a request came from."""
    return request.client.host if request.client else ""


def close_session(session: Session, request: Request, response: Response | None = None) -> None:
    """Sign a browser out on the server: its cookie is invalid from here on."""
    if token := request.cookies.get(cookie_name(request)):
        session.execute(delete(BrowserSession).where(BrowserSession.token_sha256 == sha256(token)))
    if response is not None:
        response.delete_cookie(cookie_name(request), httponly=True, samesite="lax", secure=secure(request), path="/")


# API keys -------------------------------------------------------------------------------------------------------------


def create_key(session: Session, user: User, name: str, scopes: Collection[str] = (), days: float | None = None) -> tuple[ApiKey, str]:
    """A new API key and its text, `sk-luthier-<id>-<secret>`, which cannot be shown again.

    Without `scopes` it may do all that its person's role allows; without `days` it does not expire.
    """
    if days is not None and not 0 < days <= MAX_KEY_DAYS:
        raise BadField(
            f"A key lasts for more than 0 and up to {MAX_KEY_DAYS} days.", param="days", hint="Omit it for a key without an end."
        )
    private = secrets.token_urlsafe(32)
    key = ApiKey(
        id=uuid.uuid4(),
        user_id=user.id,
        name=name.strip()[:80] or "key",
        secret_sha256=sha256(private),
        hint=private[-4:],
        scopes=policy.clean_scopes(user, scopes),
        expires_at=None if days is None else func.clock_timestamp() + timedelta(days=days),
    )
    session.add(key)
    session.flush()
    return key, f"sk-luthier-{key.id.hex}-{private}"


def list_keys(session: Session, user: User) -> list[ApiKey]:
    return list(session.scalars(select(ApiKey).where(ApiKey.user_id == user.id).order_by(ApiKey.created_at.desc())))


def revoke_key(session: Session, user: User, key_id: uuid.UUID) -> ApiKey:
    """Revoke the key. Idempotent."""
    key = session.scalars(select(ApiKey).where(ApiKey.id == key_id, ApiKey.user_id == user.id)).one_or_none()
    if key is None:
        raise NotFound(f"No such API key: {key_id}", param="key")
    key.revoked_at = key.revoked_at or func.clock_timestamp()
    return key


def _in_force() -> tuple[ColumnElement[bool], ...]:
    """Of a key: neither revoked nor expired."""
    return ApiKey.revoked_at.is_(None), or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > func.clock_timestamp())


def _known_key(session: Session, text: str) -> Row[User, ApiKey] | None:
    head, _, rest = text.removeprefix("sk-luthier-").partition("-")
    if not text.startswith("sk-luthier-") or len(head) != 32 or not rest:
        return None
    try:
        key_id = uuid.UUID(hex=head)
    except ValueError:
        return None
    query = select(User, ApiKey).join(ApiKey, ApiKey.user_id == User.id)
    query = query.where(ApiKey.id == key_id, *_in_force(), User.disabled_at.is_(None))
    found = session.execute(query).one_or_none()
    if found is None or not hmac.compare_digest(found.ApiKey.secret_sha256, sha256(rest)):
        return None
    _note_use(session, found.ApiKey)
    return found


def _note_use(session: Session, used: ApiKey | BrowserSession) -> None:
    """Resolution of a minute for "last used", which saves a write per request."""
    if used.last_used_at is None or datetime.now(UTC) - used.last_used_at > timedelta(minutes=1):
        table = type(used)
        session.execute(update(table).where(table.id == used.id).values(last_used_at=func.clock_timestamp()))


# The door -------------------------------------------------------------------------------------------------------------


def given_key(request: Request) -> str:
    """The Authorization header, stripped; where it is not empty, cookies are ignored.

    All code that distinguishes programs from browsers uses this, so that no spelling counts as a key in one place and as a cookie
    in another.
    """
    return request.headers.get("authorization", "").strip()


def identify(request: Request) -> User | None:
    """The user of a request, by one query, in a transaction of its own. `request.state.pass_` is then the credential.

    The route's own session is not used: a long upload or an open event stream would then hold its connection.
    """
    if given := given_key(request):
        kind, _, text = given.partition(" ")
        if kind.lower() != "bearer":
            return None
        with transaction() as session:
            key = _known_key(session, text.strip())
            request.state.pass_ = Pass(key_id=key.ApiKey.id) if key else None
            request.state.key_scopes = key.ApiKey.scopes if key else None
            return key.User if key else None
    token = request.cookies.get(cookie_name(request))
    if not token:
        return None
    request.state.pass_ = Pass(token_sha256=sha256(token))
    with transaction() as session:
        query = select(User, BrowserSession).join(BrowserSession, BrowserSession.user_id == User.id)
        query = query.where(BrowserSession.token_sha256 == sha256(token), BrowserSession.expires_at > func.clock_timestamp())
        found = session.execute(query.where(User.disabled_at.is_(None))).one_or_none()
        if found is None:
            return None
        _note_use(session, found.BrowserSession)
        return found.User


class Pass(NamedTuple):
    """The credential of a request: an API key or a browser session, of which one is given."""

    key_id: uuid.UUID | None = None
    token_sha256: str | None = None


def still_good(session: Session, passes: Collection[Pass]) -> set[Pass]:
    """Those of these credentials that are still valid. Disabling a person revokes all of theirs."""
    keys = (
        select(ApiKey.id).join(User).where(User.disabled_at.is_(None), ApiKey.id.in_([p.key_id for p in passes if p.key_id]), *_in_force())
    )
    tokens = [p.token_sha256 for p in passes if p.token_sha256]
    sessions = (
        select(BrowserSession.token_sha256)
        .join(User)
        .where(User.disabled_at.is_(None), BrowserSession.token_sha256.in_(tokens), BrowserSession.expires_at > func.clock_timestamp())
    )
    return {Pass(key_id=key) for key in session.scalars(keys)} | {Pass(token_sha256=token) for token in session.scalars(sessions)}


def is_public(request: Request) -> bool:
    route = request.scope.get("route")
    return getattr(route, "path", None) in PUBLIC


async def sign_in(request: Request) -> User | None:
    """A dependency of the whole app: a user, or an error, on every route that is not in `PUBLIC`.

    Async, so that a public route needs no thread: `/healthz` answers while all of them wait for the database.
    """
    if is_public(request):
        return None
    user = await run_in_threadpool(identify, request)
    if user is None:
        if given_key(request):
            raise NotSignedIn("This API key is not known here, was revoked, or has expired.", hint="Create a key under Settings, API keys.")
        raise NotSignedIn("You are not signed in.", hint="Sign in, or send an API key as `Authorization: Bearer sk-luthier-…`.")
    request.state.user = user
    policy.check(request, user, getattr(request.state, "key_scopes", None))
    return user


async def current_user(user: Annotated[User | None, Depends(sign_in)]) -> User:
    assert user is not None, "a public route has no user"
    return user


CurrentUser = Annotated[User, Depends(current_user)]
"""What a route declares: `user: CurrentUser`."""


# Forms ----------------------------------------------------------------------------------------------------------------


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
    if request.method in SAFE or given_key(request) or is_public(request):
        return
    given = request.headers.get("x-csrf-token") or request.query_params.get("csrf_token") or await _form_token(request)
    if not csrf_holds(request, given):
        raise Forbidden(
            "This form did not come from an open page of yours, or the page is too old.",
            hint="Go back, reload the page and send it again.",
            code="csrf",
        )


async def _form_token(request: Request) -> str:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    parsed = getattr(request, "_form", None) is not None  # FastAPI parsed the form already, because the route declares its fields
    if kind != "application/x-www-form-urlencoded" and not parsed:
        return ""
    value = (await request.form()).get("csrf_token", "")
    return value if isinstance(value, str) else ""
