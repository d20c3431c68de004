"""The people of the studio: their roles, invitations, and accounts that are disabled."""

from __future__ import annotations

import secrets
import unicodedata
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Select, delete, func, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app import limits
from app.errors import BadField, Conflict, NotFound
from app.kit import ids
from app.kit.json_safe import storable
from app.languages import gettext
from app.tables import ApiKey, BrowserSession, Invitation, SignInLink, TwoStep, User
from app.web.auth import sha256
from app.web.policy import check_role

INVITATION_DAYS = 7
MAX_DAYS = 90

# People ---------------------------------------------------------------------------------------------------------------


def query() -> Select[User]:
    return select(User)


def list_(session: Session) -> list[User]:
    return list(session.scalars(query().order_by(User.created_at, User.name)))


def get(session: Session, user_id: uuid.UUID) -> User:
    found = session.get(User, user_id)
    if found is None:
        message = gettext("No such person: %(id)s", id=ids.public(ids.USER, user_id))
        raise NotFound(message, param="user_id", hint=gettext("Settings, People lists them."))
    return found


def named(session: Session, name: str) -> User:
    found = session.scalar(select(User).where(User.name == name))
    if found is None:
        message = gettext("Nobody here is called %(name)s.", name=repr(name[:80]))
        raise NotFound(message, hint=gettext("`luthier users list` lists the people."), param="name")
    return found


def last_used(session: Session) -> dict[uuid.UUID, Any]:
    """When each person was last seen, with a browser or a key."""
    seen: dict[uuid.UUID, Any] = {}
    for table in (BrowserSession, ApiKey):
        used = select(table.user_id, func.max(table.last_used_at)).group_by(table.user_id)
        if table is BrowserSession:
            used = used.where(BrowserSession.share_id.is_(None))  # guests are not the person
        for user_id, when in session.execute(used):
            if when is not None:
                seen[user_id] = max(when, seen.get(user_id, when))
    return seen


def with_two_step(session: Session) -> set[uuid.UUID]:
    return set(session.scalars(select(TwoStep.user_id).where(TwoStep.confirmed_at.is_not(None))))


def set_role(session: Session, user: User, role: str) -> None:
    """Raises Conflict for the last admin."""
    check_role(role)
    if role != "admin":
        _keep_an_admin(session, user)
    user.role = role


def disable(session: Session, user: User) -> None:
    """End a person's sessions, keys and sign-in links, and with them their open streams. What they made stays."""
    _keep_an_admin(session, user)
    user.disabled_at = user.disabled_at or func.clock_timestamp()
    session.execute(delete(BrowserSession).where(BrowserSession.user_id == user.id))
    session.execute(delete(SignInLink).where(SignInLink.user_id == user.id))
    revoked = update(ApiKey).where(ApiKey.user_id == user.id, ApiKey.revoked_at.is_(None))
    session.execute(revoked.values(revoked_at=func.clock_timestamp()))
    session.execute(update(Invitation).where(Invitation.invited_by == user.id, *_is_open()).values(revoked_at=func.clock_timestamp()))
    session.flush()


def enable(session: Session, user: User) -> None:
    """Let a person sign in again. Keys that were revoked stay so."""
    user.disabled_at = None
    session.flush()


def _keep_an_admin(session: Session, user: User) -> None:
    """Raises Conflict when nobody else is an admin. The rows are locked, so that of two admins who demote each other one remains."""
    locked = select(User.id).where(User.role == "admin", User.disabled_at.is_(None)).order_by(User.id).with_for_update()
    admins = set(session.scalars(locked))
    if admins == {user.id}:
        message = gettext("%(name)s is the only admin.", name=user.name)
        raise Conflict(message, hint=gettext("Make somebody else an admin first."), code="last_admin")


def to_json(user: User) -> dict[str, Any]:
    return {
        "object": "organization.user",
        "id": ids.public(ids.USER, user.id),
        "name": user.name,
        "role": user.role,
        "added_at": int(user.created_at.timestamp()),
        "disabled": user.disabled_at is not None,
        "limits": limits.own_json(user.limits),
    }


# Invitations ----------------------------------------------------------------------------------------------------------


def invite(session: Session, by: User, role: str, note: str = "", days: float = INVITATION_DAYS) -> tuple[Invitation, str]:
    """An invitation and the path of its link, which cannot be shown again."""
    check_role(role)
    if not 0 < days <= MAX_DAYS:
        message = gettext("An invitation holds for up to %(most)s days.", most=MAX_DAYS)
        raise BadField(message, param="days", hint=gettext("Usual are %(num)s.", num=INVITATION_DAYS))
    token = secrets.token_urlsafe(32)
    expires = func.clock_timestamp() + timedelta(days=days)
    made = Invitation(
        id=uuid.uuid4(), token_sha256=sha256(token), role=role, note=storable(note.strip()[:200]), invited_by=by.id, expires_at=expires
    )
    session.add(made)
    session.flush()
    session.refresh(made)
    return made, f"/invitation/{token}"


def _is_open() -> tuple[Any, ...]:
    return Invitation.used_at.is_(None), Invitation.revoked_at.is_(None), Invitation.expires_at > func.clock_timestamp()


def open_invitations(session: Session) -> list[Invitation]:
    return list(session.scalars(select(Invitation).where(*_is_open()).order_by(Invitation.created_at.desc())))


def invitations() -> Select[Invitation]:
    return select(Invitation)


def get_invitation(session: Session, invitation_id: uuid.UUID) -> Invitation:
    found = session.get(Invitation, invitation_id)
    if found is None:
        message = gettext("No such invitation: %(id)s", id=ids.public(ids.INVITATION, invitation_id))
        raise NotFound(message, param="invite_id", hint=gettext("It may be old."))
    return found


def revoke(session: Session, invitation: Invitation) -> None:
    """Raises Conflict for one that was used: its account is disabled instead."""
    if invitation.used_at is not None:
        raise Conflict(gettext("This invitation was used already."), hint=gettext("Disable the account that was made with it."))
    invitation.revoked_at = invitation.revoked_at or func.clock_timestamp()
    session.flush()


def invited(session: Session, token: str, *, lock: bool = False) -> Invitation:
    """The open invitation of a link. Raises NotFound for one that is unknown, used, revoked or too old."""
    wanted = select(Invitation).where(Invitation.token_sha256 == sha256(token), *_is_open())
    found = session.scalar(wanted.with_for_update() if lock else wanted)
    if found is None:
        message = gettext("This invitation was used already, or it holds no more.")
        raise NotFound(message, hint=gettext("Ask for a new one."), code="invitation_over")
    return found


def accept(session: Session, token: str, name: str, password_hash: str | None) -> User:
    """Make the account that a link invites to; the link is used up by this. Without a password it is signed in to by an identity."""
    invitation = invited(session, token, lock=True)
    name = clean_name(name)
    taken = select(User.id).where(or_(User.name == name, func.lower(User.name) == name.lower()))
    if session.scalar(taken) is not None:
        raise _taken(name)
    user = User(id=uuid.uuid4(), name=name, role=invitation.role, password_hash=password_hash)
    try:
        with session.begin_nested():
            session.add(user)
            session.flush()
    except IntegrityError:  # somebody took it at the same moment
        raise _taken(name) from None
    invitation.used_at, invitation.user_id = func.clock_timestamp(), user.id
    session.flush()
    return user


def _taken(name: str) -> Conflict:
    message = gettext("Somebody here is called %(name)s already.", name=name)
    return Conflict(message, hint=gettext("Choose another name."), param="name", code="name_taken")


def clean_name(name: str) -> str:
    """A name as it is stored: letters, digits and a few signs, so that no two look alike by what cannot be seen."""
    clean = unicodedata.normalize("NFKC", name).strip()
    if not 1 <= len(clean) <= 80 or any(not (c.isalnum() or c in " .-_@+'") for c in clean) or "  " in clean:
        message = gettext("A name has 1 to 80 letters, digits, spaces or . - _ @ + '.")
        raise BadField(message, hint=gettext("Choose another name."), param="name")
    return clean


def invitation_json(invitation: Invitation, url: str | None = None) -> dict[str, Any]:
    over = invitation.expires_at < datetime.now(UTC)
    status = "accepted" if invitation.used_at else "revoked" if invitation.revoked_at else "expired" if over else "pending"
    return {
        "object": "organization.invite",
        "id": ids.public(ids.INVITATION, invitation.id),
        "role": invitation.role,
        "note": invitation.note,
        "status": status,
        "created_at": int(invitation.created_at.timestamp()),
        "expires_at": int(invitation.expires_at.timestamp()),
        "user_id": ids.public(ids.USER, invitation.user_id) if invitation.user_id else None,
        "url": url,
    }
