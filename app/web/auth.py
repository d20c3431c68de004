"""Authentication: users, sign-in links, passwords, browser sessions and API keys.

Secrets are random and long, so their SHA-256 is stored and compared; passwords are short, so they get argon2id. Every route
requires `sign_in`, which `app.main` sets as a dependency of the whole app; the only exceptions are the paths in `PUBLIC`. A
cookie is sent by the browser even when another site caused the request, so every change with a cookie must also carry a token
only our own pages know (`app.web.csrf`). An API key needs none: no browser adds it.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import uuid
from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from typing import Annotated, NamedTuple

from fastapi import Depends, Request, Response
from itsdangerous import BadData, URLSafeSerializer
from sqlalchemy import ColumnElement, and_, delete, func, or_, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from app.db import transaction
from app.errors import BadField, Forbidden, NotFound, NotSignedIn
from app.kit import ids
from app.kit.secret import secret
from app.languages import gettext
from app.settings import get_settings
from app.tables import ApiKey, BrowserSession, ProjectMember, ShareLink, SignInLink, User
from app.tables.projects import make_own
from app.web import passwords, policy

PUBLIC = frozenset({"/healthz", "/readyz", "/metrics", "/sign-in", "/sign-in/code", "/sign-in/{token}"})
PUBLIC |= {"/invitation/{token}", "/shared/{token}", "/oidc/begin", "/oidc/callback"}
"""Routes that need no account. `/metrics` has its own check: signed in, or from this machine."""

SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
SESSION_DAYS = 30
KNOWN_DAYS = 400
LINK_MINUTES = 60
MAX_KEY_DAYS = 3650
ORGANIZATION = "org-luthier"


# Secrets --------------------------------------------------------------------------------------------------------------


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


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
    new = session.scalar(made.on_conflict_do_nothing(index_elements=["name"]).returning(User.id))
    user = session.scalars(select(User).where(User.name == settings.admin_name)).one()
    if new is not None:
        make_own(session, user.id, user.name)
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
        raise NotFound(gettext("This sign-in link was used already, or it is too old."), hint=gettext("Run `luthier link` for a new one."))
    return session.get_one(User, user_id)


async def check_password(name: str, password: str, address: str, browser: str | None = None) -> uuid.UUID:
    """The id of the user with this name and password. `browser` is the cookie of `known_browser`.

    Raises NotSignedIn, or TooMany where too many attempts were made before or are being checked.
    """
    tries, user_id, known = await run_in_threadpool(_begin_try, name, address, browser)
    if not await passwords.judge(password, known) or user_id is None:
        message = gettext("That name and password do not match.")
        raise NotSignedIn(message, hint=gettext("Try again, or use a sign-in link from `luthier link`."))
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


def open_session(session: Session, request: Request, response: Response, user: User, link: ShareLink | None = None) -> None:
    """Sign a browser in, always with a new session, so that a token planted before the sign-in is worthless (session fixation).
    With `link` it is a guest's, who sees the project of the link."""
    close_session(session, request)
    token = secrets.token_urlsafe(32)
    expires = func.clock_timestamp() + timedelta(days=SESSION_DAYS)
    browser = request.headers.get("user-agent", "").replace("\0", "")[:300]
    session.add(
        BrowserSession(
            token_sha256=sha256(token),
            user_id=user.id,
            expires_at=expires,
            address=address_of(request),
            browser=browser,
            project_id=link.project_id if link else None,
            share_id=link.id if link else None,
        )
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


def create_key(
    session: Session, user: User, name: str, scopes: Collection[str] = (), days: float | None = None, project_id: uuid.UUID | None = None
) -> tuple[ApiKey, str]:
    """A new API key and its text, `sk-luthier-<id>-<secret>`, which cannot be shown again.

    Without `scopes` it may do all that its person's role allows; without `days` it does not expire; with `project_id` it reaches that
    project alone, and otherwise any of its person's.
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
        project_id=project_id,
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
        raise NotFound(gettext("No such API key: %(key)s", key=key_id), param="key")
    key.revoked_at = key.revoked_at or func.clock_timestamp()
    return key


def _in_force() -> tuple[ColumnElement[bool], ...]:
    """Of a key: neither revoked nor expired."""
    return ApiKey.revoked_at.is_(None), or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > func.clock_timestamp())


class KnownKey(NamedTuple):
    """A key in force, its person, and the project that the request works in with the role there."""

    User: User
    ApiKey: ApiKey
    project_id: uuid.UUID
    role: str


def wanted_project(request: Request) -> uuid.UUID | None:
    """The project that the header `OpenAI-Project` names. Raises Forbidden, also for an organization that is not this studio."""
    if (organization := request.headers.get("openai-organization")) not in (None, "", ORGANIZATION):
        raise Forbidden(
            f"No such organization: {organization[:80]}", hint=f"This studio is {ORGANIZATION}.", code="mismatched_organization"
        )
    if not (text := request.headers.get("openai-project")):
        return None
    try:
        return ids.parse_project(text)
    except NotFound:
        raise _no_project(text) from None


def _no_project(text: str) -> Forbidden:
    message = f"This API key does not reach the project {text[:80]}."
    return Forbidden(message, hint="Settings, Projects lists yours with their ids.", code="mismatched_project")


def _known_key(session: Session, text: str, wanted: uuid.UUID | None) -> KnownKey | None:
    head, _, rest = text.removeprefix("sk-luthier-").partition("-")
    if not text.startswith("sk-luthier-") or len(head) != 32 or not rest:
        return None
    try:
        key_id = uuid.UUID(hex=head)
    except ValueError:
        return None
    project = func.coalesce(ApiKey.project_id, wanted, User.id)
    query = select(User, ApiKey, project.label("project_id"), ProjectMember.role).join(ApiKey, ApiKey.user_id == User.id)
    query = query.outerjoin(ProjectMember, and_(ProjectMember.project_id == project, ProjectMember.user_id == User.id))
    query = query.where(ApiKey.id == key_id, *_in_force(), User.disabled_at.is_(None))
    found = session.execute(query).one_or_none()
    if found is None or not hmac.compare_digest(found.ApiKey.secret_sha256, sha256(rest)):
        return None
    _note_use(session, found.ApiKey)
    if found.role is None or (wanted is not None and wanted != found.project_id):
        raise _no_project(ids.public(ids.PROJECT, wanted or found.project_id))
    return KnownKey(*found)


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


class OnBehalf(NamedTuple):
    """For whom the studio itself sends a request, within its own process (`app/web/batch_runner.py`)."""

    user_id: uuid.UUID
    project_id: uuid.UUID


ON_BEHALF = "luthier.on_behalf"
"""Where an `OnBehalf` stands in the scope of a request. Only this process fills scopes: nothing that a client sends gets there."""


def _on_behalf(request: Request, who: OnBehalf) -> User | None:
    with transaction() as session:
        member = and_(ProjectMember.user_id == User.id, ProjectMember.project_id == who.project_id)
        query = select(User, ProjectMember.role).join(ProjectMember, member).where(User.id == who.user_id, User.disabled_at.is_(None))
        found = session.execute(query).one_or_none()
    if found is None:
        return None
    request.state.project_role = found.role
    request.state.pass_ = Pass(project_id=who.project_id)
    user: User = found.User
    return user.work_in(who.project_id)


def identify(request: Request) -> User | None:
    """The user of a request, by one query, in a transaction of its own. `request.state.pass_` is then the credential.

    The route's own session is not used: a long upload or an open event stream would then hold its connection.
    """
    if (who := request.scope.get(ON_BEHALF)) is not None:
        return _on_behalf(request, who)
    if given := given_key(request):
        kind, _, text = given.partition(" ")
        if kind.lower() != "bearer":
            return None
        with transaction() as session:
            key = _known_key(session, text.strip(), wanted_project(request))
            if key is None:
                return None
            request.state.pass_ = Pass(key_id=key.ApiKey.id, project_id=key.project_id)
            request.state.key_scopes = key.ApiKey.scopes
            request.state.project_role = key.role
            return key.User.work_in(key.project_id)
    token = request.cookies.get(cookie_name(request))
    if not token:
        return None
    with transaction() as session:
        project = func.coalesce(BrowserSession.project_id, User.id)
        query = select(User, BrowserSession, ProjectMember.role).join(BrowserSession, BrowserSession.user_id == User.id)
        query = query.outerjoin(ProjectMember, and_(ProjectMember.project_id == project, ProjectMember.user_id == User.id))
        query = query.where(BrowserSession.token_sha256 == sha256(token), BrowserSession.expires_at > func.clock_timestamp())
        found = session.execute(query.where(User.disabled_at.is_(None))).one_or_none()
        if found is None:
            return None
        _note_use(session, found.BrowserSession)
        if found.BrowserSession.share_id is not None:
            user, role = _guest(found.BrowserSession), "viewer"
        elif found.role is None:  # a membership that ended leaves the person's own project
            user, role = found.User, "admin"
        else:
            user, role = found.User.work_in(found.BrowserSession.project_id or found.User.id), found.role
    request.state.project_role = role
    request.state.pass_ = Pass(token_sha256=sha256(token), project_id=user.project_id)
    return user


def _guest(opened: BrowserSession) -> User:
    """Whoever came by a link that shows a project: nobody with an account, who reads that project alone."""
    assert opened.share_id is not None and opened.project_id is not None, "a link leads to a project"
    return User(id=opened.share_id, name="Guest", role="guest").work_in(opened.project_id)


class Pass(NamedTuple):
    """The credential of a request: an API key or a browser session, of which one is given, and the project it works in."""

    key_id: uuid.UUID | None = None
    token_sha256: str | None = None
    project_id: uuid.UUID | None = None


def still_good(session: Session, passes: Collection[Pass]) -> set[Pass]:
    """Those of these credentials that are still valid: in force, of a person who is not disabled and still a member of the project."""
    keys = select(ApiKey.id, User.id).join(User).where(ApiKey.id.in_([p.key_id for p in passes if p.key_id]), *_in_force())
    tokens = select(BrowserSession.token_sha256, User.id, BrowserSession.share_id).join(User)
    tokens = tokens.where(BrowserSession.token_sha256.in_([p.token_sha256 for p in passes if p.token_sha256]))
    here: dict[uuid.UUID | str, uuid.UUID] = {}
    here.update((key, user_id) for key, user_id in session.execute(keys.where(User.disabled_at.is_(None))))
    guests = set()
    for token, user_id, share_id in session.execute(
        tokens.where(User.disabled_at.is_(None), BrowserSession.expires_at > func.clock_timestamp())
    ):
        here[token] = user_id
        guests |= {token} if share_id else set()
    members = select(ProjectMember.project_id, ProjectMember.user_id).where(ProjectMember.user_id.in_(here.values()))
    places = {(project_id, user_id) for project_id, user_id in session.execute(members)}

    def is_good(held: Pass) -> bool:
        key = held.key_id or held.token_sha256 or ""
        return key in here and (held.project_id is None or key in guests or (held.project_id, here[key]) in places)

    return {held for held in passes if is_good(held)}


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
        hint = gettext("Sign in, or send an API key as `Authorization: Bearer sk-luthier-…`.")
        raise NotSignedIn(gettext("You are not signed in."), hint=hint)
    request.state.user = user
    policy.check(request, user, request.state.project_role, getattr(request.state, "key_scopes", None))
    return user


async def current_user(user: Annotated[User | None, Depends(sign_in)]) -> User:
    assert user is not None, "a public route has no user"
    return user


CurrentUser = Annotated[User, Depends(current_user)]
"""What a route declares: `user: CurrentUser`."""
