"""Who is asking: users, sign-in links, passwords, browser sessions and API keys.

Secrets are random and long, so their SHA-256 is stored and compared; passwords are short, so they get argon2id.
Every route is behind `sign_in`, which `app.main` sets as the dependency of the whole app; the only exceptions are the
paths in `PUBLIC`. A cookie is sent by the browser even when another site asked for it, so whatever changes something
with a cookie must also carry a token only our own pages know (`check_csrf`). An API key needs none: no browser adds it.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import ipaddress
import os
import secrets
import uuid
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Annotated, Any

from fastapi import Depends, Request, Response
from sqlalchemy import delete, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app.db import transaction
from app.errors import Forbidden, NotFound, NotSignedIn, TooMany
from app.settings import get_settings
from app.tables import ApiKey, BrowserSession, SignInLink, User

PUBLIC = frozenset({"/healthz", "/readyz", "/metrics", "/sign-in", "/sign-in/{token}"})
"""Every route that may be asked without an account. `/metrics` guards itself: signed in, or from this machine."""

SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
SESSION_DAYS = 30
LINK_MINUTES = 60
FREE_TRIES = 5
LONGEST_WAIT_SECONDS = 900


# Secrets --------------------------------------------------------------------------------------------------------------


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def secret(name: str = "session") -> bytes:
    """A random secret of this studio, made at the first start and readable by its owner alone (0600)."""
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


def _hasher() -> Any:
    from pwdlib import PasswordHash  # argon2 is only loaded by those who sign in with a password

    return PasswordHash.recommended()


@cache
def _nobody() -> str:
    """A hash that no password matches, checked for unknown names so that they take as long as known ones."""
    return str(_hasher().hash(secrets.token_hex(16)))


# People ---------------------------------------------------------------------------------------------------------------


def first_user(session: Session) -> User:
    """The account that owns the studio, made at the first start; its password follows LUTHIER_ADMIN_PASSWORD."""
    settings = get_settings()
    session.execute(insert(User).values(id=uuid.uuid4(), name=settings.admin_name).on_conflict_do_nothing(index_elements=["name"]))
    user = session.scalars(select(User).where(User.name == settings.admin_name)).one()
    password = settings.admin_password
    if password and not (user.password_hash and _hasher().verify(password, user.password_hash)):
        user.password_hash = _hasher().hash(password)
    return user


def new_sign_in_link(session: Session, user: User, minutes: float = LINK_MINUTES) -> str:
    """A path that signs `user` in once within `minutes`. Its token is not stored, only the hash of it."""
    token = secrets.token_urlsafe(32)
    expires = func.clock_timestamp() + timedelta(minutes=minutes)
    session.add(SignInLink(token_sha256=sha256(token), user_id=user.id, expires_at=expires))
    session.flush()
    return f"/sign-in/{token}"


def use_link(session: Session, token: str) -> User:
    """The user of a sign-in link, which is spent by this. Raises NotFound when it is unknown, spent or too old."""
    spent = (
        update(SignInLink)
        .where(SignInLink.token_sha256 == sha256(token), SignInLink.used_at.is_(None), SignInLink.expires_at > func.clock_timestamp())
        .values(used_at=func.clock_timestamp())
        .returning(SignInLink.user_id)
    )
    user_id = session.scalar(spent)
    if user_id is None:
        raise NotFound("This sign-in link was used already, or it is too old.", way_out="Run `luthier link` for a new one.")
    return session.get_one(User, user_id)


def check_password(session: Session, name: str, password: str, address: str) -> User:
    """The user with this name and password. Raises NotSignedIn, or TooMany after five failures from one address."""
    tries = _Tries(name, address)
    tries.refuse_if_too_many()
    user = session.scalars(select(User).where(User.name == name)).one_or_none()
    known = user.password_hash if user and user.password_hash else None
    right = _hasher().verify(password, known or _nobody())
    if user is None or known is None or not right:
        tries.failed()
        raise NotSignedIn("That name and password do not match.", way_out="Try again, or use a sign-in link from `luthier link`.")
    tries.forget()
    return user


class _Tries:
    """Failed sign-ins of one account from one address, counted in Redis so that every web process sees them.

    Five are free; each further one doubles the wait, from 30 seconds to a quarter of an hour.
    """

    def __init__(self, name: str, address: str) -> None:
        from app.queue import PREFIX, get_redis

        self.redis = get_redis()
        self.key = f"{PREFIX}tries:{sha256(f'{name}|{_network(address)}')}"

    def refuse_if_too_many(self) -> None:
        wait = self.redis.pttl(f"{self.key}:wait")
        if wait > 0:
            seconds = -(-wait // 1000)
            raise TooMany(
                "Too many failed sign-ins.",
                way_out=f"Wait {seconds} seconds, or use a sign-in link from `luthier link`.",
                retry_after_seconds=float(seconds),
            )

    def failed(self) -> None:
        with self.redis.pipeline() as pipe:
            count = pipe.incr(self.key).expire(self.key, 86_400).execute()[0]
        if count >= FREE_TRIES:
            wait = min(30 * 2 ** min(count - FREE_TRIES, 10), LONGEST_WAIT_SECONDS)
            self.redis.set(f"{self.key}:wait", 1, ex=wait)

    def forget(self) -> None:
        self.redis.delete(self.key, f"{self.key}:wait")


def _network(address: str) -> str:
    """An IPv4 address itself, or the /64 an IPv6 address lies in, since one person owns all of that."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    return str(ip if ip.version == 4 else ipaddress.ip_network((ip, 64), strict=False))


# Browser sessions -----------------------------------------------------------------------------------------------------


def secure(request: Request) -> bool:
    """Whether the browser speaks https, to us or to the proxy in front of us."""
    return request.url.scheme == "https" or (get_settings().public_url or "").startswith("https://")


def cookie_name(request: Request) -> str:
    """Browsers refuse `__Host-` cookies over plain http, which is what 127.0.0.1 speaks."""
    return "__Host-luthier" if secure(request) else "luthier"


def open_session(session: Session, request: Request, response: Response, user: User) -> None:
    """Sign a browser in: a new session always, so that a token planted before the sign-in is worth nothing."""
    close_session(session, request)
    token = secrets.token_urlsafe(32)
    expires = func.clock_timestamp() + timedelta(days=SESSION_DAYS)
    session.add(BrowserSession(token_sha256=sha256(token), user_id=user.id, expires_at=expires))
    session.execute(delete(BrowserSession).where(BrowserSession.expires_at < func.clock_timestamp()))
    response.set_cookie(
        cookie_name(request), token, max_age=SESSION_DAYS * 86_400, httponly=True, samesite="lax", secure=secure(request), path="/"
    )


def close_session(session: Session, request: Request, response: Response | None = None) -> None:
    """Sign a browser out on the server: its cookie is worth nothing from here on."""
    if token := request.cookies.get(cookie_name(request)):
        session.execute(delete(BrowserSession).where(BrowserSession.token_sha256 == sha256(token)))
    if response is not None:
        response.delete_cookie(cookie_name(request), httponly=True, samesite="lax", secure=secure(request), path="/")


# API keys -------------------------------------------------------------------------------------------------------------


def create_key(session: Session, user: User, name: str) -> tuple[ApiKey, str]:
    """A new API key and its text, `sk-luthier-<id>-<secret>`, which can never be shown again."""
    private = secrets.token_urlsafe(32)
    key = ApiKey(id=uuid.uuid4(), user_id=user.id, name=name.strip()[:80] or "key", secret_sha256=sha256(private), hint=private[-4:])
    session.add(key)
    session.flush()
    return key, f"sk-luthier-{key.id.hex}-{private}"


def list_keys(session: Session, user: User) -> list[ApiKey]:
    return list(session.scalars(select(ApiKey).where(ApiKey.user_id == user.id).order_by(ApiKey.created_at.desc())))


def revoke_key(session: Session, user: User, key_id: uuid.UUID) -> ApiKey:
    """From here on the key is refused. Revoking it twice is fine."""
    key = session.scalars(select(ApiKey).where(ApiKey.id == key_id, ApiKey.user_id == user.id)).one_or_none()
    if key is None:
        raise NotFound(f"No such API key: {key_id}", param="key")
    key.revoked_at = key.revoked_at or func.clock_timestamp()
    return key


def _user_of_key(session: Session, text: str) -> User | None:
    head, _, rest = text.removeprefix("sk-luthier-").partition("-")
    if not text.startswith("sk-luthier-") or len(head) != 32 or not rest:
        return None
    try:
        key_id = uuid.UUID(hex=head)
    except ValueError:
        return None
    query = select(User, ApiKey).join(ApiKey, ApiKey.user_id == User.id).where(ApiKey.id == key_id, ApiKey.revoked_at.is_(None))
    found = session.execute(query).one_or_none()
    if found is None or not hmac.compare_digest(found.ApiKey.secret_sha256, sha256(rest)):
        return None
    _note_use(session, found.ApiKey)
    return found.User


def _note_use(session: Session, key: ApiKey) -> None:
    """A minute is fine enough for "last used", and spares a write on every request."""
    if key.last_used_at is None or datetime.now(UTC) - key.last_used_at > timedelta(minutes=1):
        session.execute(update(ApiKey).where(ApiKey.id == key.id).values(last_used_at=func.clock_timestamp()))


# The door -------------------------------------------------------------------------------------------------------------


def identify(request: Request) -> User | None:
    """The user behind a request, by one query, in a transaction of its own.

    The route's own session is not used: a long upload or an open event stream would then hold its connection.
    """
    kind, _, text = request.headers.get("authorization", "").partition(" ")
    if kind:
        if kind.lower() != "bearer":
            return None
        with transaction() as session:
            return _user_of_key(session, text.strip())
    token = request.cookies.get(cookie_name(request))
    if not token:
        return None
    with transaction() as session:
        query = select(User).join(BrowserSession, BrowserSession.user_id == User.id)
        return session.scalars(
            query.where(BrowserSession.token_sha256 == sha256(token), BrowserSession.expires_at > func.clock_timestamp())
        ).one_or_none()


def is_public(request: Request) -> bool:
    route = request.scope.get("route")
    return getattr(route, "path", None) in PUBLIC


def sign_in(request: Request) -> User | None:
    """The dependency of the whole app: a user, or an error, on every route that is not in `PUBLIC`."""
    if is_public(request):
        return None
    user = identify(request)
    if user is None:
        if request.headers.get("authorization"):
            raise NotSignedIn("This API key is not known here, or it was revoked.", way_out="Create a key under Settings, API keys.")
        raise NotSignedIn("You are not signed in.", way_out="Sign in, or send an API key as `Authorization: Bearer sk-luthier-…`.")
    request.state.user = user
    return user


def current_user(user: Annotated[User | None, Depends(sign_in)]) -> User:
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
    return bool(token and mark) and hmac.compare_digest(mark, _csrf_mark(token, salt))


async def check_csrf(request: Request) -> None:
    """The second dependency of the whole app: a cookie alone may not change anything.

    The token comes in the header `x-csrf-token`, in the form field `csrf_token`, or, for a multipart form that the
    route reads as a stream, in the query (`<form action="/datasets?{{ csrf_query() }}">`).
    """
    if request.method in SAFE or request.headers.get("authorization") or is_public(request):
        return
    given = request.headers.get("x-csrf-token") or request.query_params.get("csrf_token") or await _form_token(request)
    if not csrf_holds(request, given):
        raise Forbidden(
            "This form did not come from an open page of yours, or the page is too old.",
            way_out="Go back, reload the page and send it again.",
            code="csrf",
        )


async def _form_token(request: Request) -> str:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    parsed = getattr(request, "_form", None) is not None  # FastAPI read the form already, because the route declares its fields
    if kind != "application/x-www-form-urlencoded" and not parsed:
        return ""
    value = (await request.form()).get("csrf_token", "")
    return value if isinstance(value, str) else ""
