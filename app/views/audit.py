"""The audit log as the API, the page and the export show it."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Select, or_, select
from sqlalchemy.orm import Session

from app.db import transaction
from app.errors import BadField, NotFound
from app.kit import ids
from app.languages import gettext
from app.tables import AuditLog

PREFIX = "audit_log"
Json = dict[str, Any]


@dataclass
class AuditFilter:
    """Which events; empty means all. `since` and `until` are Unix seconds, `until` excluded."""

    types: Sequence[str] = ()
    actors: Sequence[str] = ()
    """Ids of people or keys, or names of people."""
    objects: Sequence[str] = ()
    since: int | None = None
    until: int | None = None

    def query(self) -> Select[AuditLog]:
        found = select(AuditLog)
        if self.types:
            found = found.where(AuditLog.type.in_(self.types))
        if self.actors:
            keys = [key for actor in self.actors if (key := _uuid(actor))]
            found = found.where(or_(AuditLog.user_name.in_(self.actors), AuditLog.user_id.in_(keys), AuditLog.key_id.in_(keys)))
        if self.objects:
            found = found.where(AuditLog.object_id.in_(self.objects))
        if self.since is not None:
            found = found.where(AuditLog.created_at >= _when(self.since))
        if self.until is not None:
            found = found.where(AuditLog.created_at < _when(self.until))
        return found


def _when(seconds: int) -> datetime:
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):
        raise BadField(gettext("%(text)s is no time.", text=seconds), hint=gettext("Send Unix seconds."), param="effective_at") from None


def _uuid(text: str) -> uuid.UUID | None:
    try:
        return uuid.UUID(hex=text.rpartition("-")[2] if text.startswith(("key-", "user-")) else text)
    except ValueError:
        return None


def key_of(text: str) -> int:
    """The number in `audit_log-12`. Raises NotFound."""
    head, _, number = text.partition("-")
    if head != PREFIX or not number.isascii() or not number.isdigit() or len(number) > 18:
        raise NotFound(gettext("No such event: %(id)s", id=text[:80]), param="after")
    return int(number)


def to_json(row: AuditLog) -> Json:
    person = {"id": row.user_id.hex if row.user_id else None, "email": row.user_name}
    by_key = row.actor == "api_key"
    told: Json = {
        "id": f"{PREFIX}-{row.id}",
        "object": "organization.audit_log",
        "type": row.type,
        "effective_at": int(row.created_at.timestamp()),
        "actor": {
            "type": "api_key" if by_key else "session",
            "session": None if by_key else {"user": person if row.user_id else None, "ip_address": row.address},
            "api_key": {"id": ids.public("key", row.key_id) if row.key_id else None, "type": "user", "user": person} if by_key else None,
        },
        "object_id": row.object_id,
        "ip_address": row.address,
        "request_id": row.request_id,
        "details": row.details,
    }
    if row.type in ("api_key.created", "api_key.deleted", "checkpoint.permission.created", "checkpoint.permission.deleted"):
        told[row.type] = {"id": row.object_id}
    if row.type == "login.failed":
        status = (row.details or {}).get("status")
        told[row.type] = {"error_code": str(status), "error_message": "Too many attempts." if status == 429 else "Refused."}
    return told


def types(session: Session) -> list[str]:
    """Every type that occurs, for the filter of the page."""
    return list(session.scalars(select(AuditLog.type).distinct().order_by(AuditLog.type)))


def lines(wish: AuditFilter) -> Iterator[bytes]:
    """The events as JSON lines, oldest first, in constant memory: read a thousand at a time, each in a transaction of its own."""
    last = 0
    while True:
        with transaction() as session:
            rows = session.scalars(wish.query().where(AuditLog.id > last).order_by(AuditLog.id).limit(1000)).all()
        if not rows:
            return
        last = rows[-1].id
        yield "".join(json.dumps(to_json(row), ensure_ascii=False) + "\n" for row in rows).encode()
