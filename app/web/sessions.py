"""A person's browser sessions: where they are signed in, and how to end that."""

from __future__ import annotations

import re
import uuid

from fastapi import Request
from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from app.db import touched
from app.errors import NotFound
from app.languages import gettext
from app.tables import BrowserSession, User
from app.web.auth import cookie_name, sha256


def list_(session: Session, user: User) -> list[BrowserSession]:
    """Sessions in force, the one used last first."""
    query = select(BrowserSession).where(BrowserSession.user_id == user.id, BrowserSession.expires_at > func.clock_timestamp())
    query = query.where(BrowserSession.share_id.is_(None))  # guests came by a link of this person's
    return list(session.scalars(query.order_by(BrowserSession.last_used_at.desc())))


def is_this(request: Request, found: BrowserSession) -> bool:
    return sha256(request.cookies.get(cookie_name(request), "")) == found.token_sha256


def end(session: Session, user: User, session_id: uuid.UUID) -> None:
    own = BrowserSession.user_id == user.id, BrowserSession.share_id.is_(None)
    gone = touched(session, delete(BrowserSession).where(BrowserSession.id == session_id, *own))
    if not gone:
        raise NotFound(gettext("No such session."), hint=gettext("It may have ended already."))


def end_all(session: Session, user_id: uuid.UUID, but: Request | None = None) -> int:
    """End every session of a person, but for the one of the request `but`; returns how many."""
    query = delete(BrowserSession).where(BrowserSession.user_id == user_id, BrowserSession.share_id.is_(None))
    if but is not None:
        query = query.where(BrowserSession.token_sha256 != sha256(but.cookies.get(cookie_name(but), "")))
    return touched(session, query)


_BROWSERS = (("Edg/", "Edge"), ("OPR/", "Opera"), ("Firefox/", "Firefox"), ("Chrome/", "Chrome"), ("Safari/", "Safari"), ("curl/", "curl"))
_SYSTEMS = (
    ("Android", "Android"),
    ("iPhone", "iPhone"),
    ("iPad", "iPad"),
    ("Windows", "Windows"),
    ("Mac OS X", "macOS"),
    ("Linux", "Linux"),
)


def browser_name(user_agent: str) -> str:
    """`Firefox on Linux`; what is not known by its first word."""
    browser = next((name for mark, name in _BROWSERS if mark in user_agent), None)
    system = next((name for mark, name in _SYSTEMS if mark in user_agent), None)
    if browser is None:
        word = re.match(r"[\w.-]{1,40}", user_agent)
        return word[0] if word else gettext("Unknown")
    return gettext("%(browser)s on %(system)s", browser=browser, system=system) if system else browser
