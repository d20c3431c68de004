"""Two-step sign-in: a one-time code after the password.

The secret of a person's codes is computed from a random salt and a secret file of the studio, so that a copy of the database alone
gives no codes. A code is taken once; recovery codes are random, stored as hashes, and taken once too.
"""

from __future__ import annotations

import hmac
import secrets
import time
import uuid

from fastapi import Request
from itsdangerous import BadData, URLSafeTimedSerializer
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.errors import Conflict, NotSignedIn
from app.kit import totp
from app.kit.secret import secret
from app.languages import gettext
from app.tables import TwoStep, User
from app.web import passwords
from app.web.auth import address_of, known_browser, known_to, sha256

TICKET_SECONDS = 300
NUM_RECOVERY = 10
ISSUER = "Luthier"


def is_on(session: Session, user_id: uuid.UUID) -> bool:
    query = select(TwoStep.user_id).where(TwoStep.user_id == user_id, TwoStep.confirmed_at.is_not(None))
    return session.scalar(query) is not None


def find(session: Session, user: User) -> TwoStep | None:
    return session.get(TwoStep, user.id)


def begin(session: Session, user: User) -> TwoStep:
    """A new secret, not in force until its first code was confirmed. Raises Conflict where codes are asked for already."""
    found = session.get(TwoStep, user.id, with_for_update=True)
    if found is not None and found.confirmed_at is not None:
        raise Conflict(gettext("Two-step sign-in is on already."), hint=gettext("Turn it off first."))
    if found is None:
        found = TwoStep(user_id=user.id, salt="")
        session.add(found)
    found.salt, found.last_step = secrets.token_hex(16), 0
    session.flush()
    return found


def key_of(found: TwoStep) -> bytes:
    """The secret of the codes, 20 bytes as RFC 4226 recommends."""
    return hmac.new(secret("two_step"), f"{found.user_id.hex}|{found.salt}".encode(), "sha1").digest()


def setup_text(found: TwoStep) -> str:
    """The secret in groups of four, to be typed."""
    text = totp.in_base32(key_of(found))
    return " ".join(text[at : at + 4] for at in range(0, len(text), 4))


def setup_uri(found: TwoStep, user: User) -> str:
    return totp.uri(key_of(found), ISSUER, user.name)


def confirm(session: Session, user: User, code: str) -> list[str]:
    """Turn it on with the first right code; returns the recovery codes, which cannot be shown again."""
    found = session.get(TwoStep, user.id, with_for_update=True)
    if found is None or found.confirmed_at is not None:
        raise Conflict(gettext("There is no two-step sign-in to confirm."), hint=gettext("Begin again."))
    _take_code(found, code)
    codes = ["-".join(secrets.token_hex(2) for _ in range(5)) for _ in range(NUM_RECOVERY)]
    found.confirmed_at, found.recovery = func.clock_timestamp(), [sha256(code) for code in codes]
    session.flush()
    return codes


def take(session: Session, user_id: uuid.UUID, code: str) -> None:
    """Use up a code, or a recovery code. Raises NotSignedIn for a wrong one and for one that was taken before."""
    found = session.get(TwoStep, user_id, with_for_update=True)
    if found is None or found.confirmed_at is None:
        return
    used = sha256(code.strip().lower())
    if used in found.recovery:
        found.recovery = [one for one in found.recovery if one != used]
    else:
        _take_code(found, code)
    session.flush()


def _take_code(found: TwoStep, code: str) -> None:
    step = totp.step_of(key_of(found), "".join(code.split()), time.time())
    if step is None or step <= found.last_step:
        message = gettext("This code is wrong, too old, or was used already.")
        raise NotSignedIn(message, hint=gettext("Wait for the next one in your app."), code="wrong_code")
    found.last_step = step


def turn_off(session: Session, user_id: uuid.UUID) -> None:
    found = session.get(TwoStep, user_id)
    if found is not None:
        session.delete(found)
        session.flush()


def tries_of(user: User, request: Request) -> passwords.Tries:
    """Count an attempt at a code, as one at a password is counted. Raises TooMany."""
    browser = known_browser(request)
    tries = passwords.Tries(f"code|{user.id.hex}", address_of(request), known_to(user.id, browser) if browser else None)
    tries.take()
    return tries


# Between password and code --------------------------------------------------------------------------------------------


def ticket_for(user_id: uuid.UUID, password_hash: str | None) -> str:
    """Says that this person's password was right a moment ago. It signs nobody in, and another password ends it."""
    return str(_signer().dumps([user_id.hex, sha256(password_hash or "")[:16]]))


def holder_of(session: Session, ticket: str) -> User:
    try:
        user_id, mark = _signer().loads(ticket, max_age=TICKET_SECONDS)
        user = session.get(User, uuid.UUID(hex=user_id))
    except (BadData, ValueError, TypeError, AttributeError):
        user = None
    if user is None or user.disabled_at is not None or sha256(user.password_hash or "")[:16] != mark:
        raise NotSignedIn(gettext("This took too long."), hint=gettext("Sign in again."), code="ticket_over")
    return user


def _signer() -> URLSafeTimedSerializer:
    return URLSafeTimedSerializer(secret(), salt="two step")
