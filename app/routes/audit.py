"""`/v1/organization/audit_logs` and the page of the audit log: who did what to which object, when, and from where."""

from __future__ import annotations

import time
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response, StreamingResponse
from sqlalchemy import select

from app import schemas
from app.db import Db
from app.errors import BadField
from app.schemas.openapi import answers
from app.tables import AuditLog
from app.views import audit
from app.views.audit import AuditFilter
from app.web.auth import CurrentUser
from app.web.pagination import MAX_NUMBER, After, page
from app.web.templates import render

api = APIRouter(prefix="/v1")
pages = APIRouter()
Json = dict[str, Any]
SHOWN = 100


def bound(name: str) -> Any:
    return Query(None, alias=f"effective_at[{name}]", ge=0, le=10**11, description="Unix seconds.")


@api.get("/organization/audit_logs", operation_id="list_audit_logs", responses=answers(schemas.page_of(schemas.AuditLog), 403))
def list_audit_logs(
    session: Db,
    user: CurrentUser,
    after: After = None,
    before: Annotated[str | None, Query(description="Id of the first object of the page after.")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    event_types: Annotated[list[str] | None, Query(alias="event_types[]", max_length=100)] = None,
    actor_ids: Annotated[list[str] | None, Query(alias="actor_ids[]", max_length=100, description="Of people or API keys.")] = None,
    actor_emails: Annotated[list[str] | None, Query(alias="actor_emails[]", max_length=100, description="Names of people.")] = None,
    resource_ids: Annotated[list[str] | None, Query(alias="resource_ids[]", max_length=100)] = None,
    gt: int | None = bound("gt"),
    gte: int | None = bound("gte"),
    lt: int | None = bound("lt"),
    lte: int | None = bound("lte"),
) -> Json:
    """Events of the audit log, newest first. For admins."""
    since = [bound for bound in (gte, None if gt is None else gt + 1) if bound is not None]
    until = [bound for bound in (lt, None if lte is None else lte + 1) if bound is not None]
    wish = AuditFilter(
        types=event_types or (),
        actors=[*(actor_ids or ()), *(actor_emails or ())],
        objects=resource_ids or (),
        since=max(since, default=None),
        until=min(until, default=None),
    )
    if before is not None:
        if after is not None:
            raise BadField("`before` and `after` exclude each other.", hint="Send one of them.", param="before")
        newer = session.scalars(wish.query().where(AuditLog.id > audit.key_of(before)).order_by(AuditLog.id).limit(limit + 1)).all()
        rows = [audit.to_json(row) for row in reversed(newer[:limit])]
        ends = {"first_id": rows[0]["id"] if rows else None, "last_id": rows[-1]["id"] if rows else None}
        return {"object": "list", "data": rows, "has_more": len(newer) > limit, **ends}
    return page(wish.query(), after, limit, "desc", audit.to_json, session=session, key=audit.key_of)


def _wish(type: str, person: str, object: str, days: str) -> AuditFilter:
    return AuditFilter(
        types=[type] if type else (),
        actors=[person.strip()] if person.strip() else (),
        objects=[object.strip()] if object.strip() else (),
        since=int(time.time()) - int(days) * 86_400 if days else None,
    )


Words = Annotated[str, Query(max_length=300)]
Days = Annotated[str, Query(pattern="^([1-9][0-9]{0,4})?$")]
"""Empty as the form sends it: all time."""


@pages.get("/admin/audit")
def show(
    request: Request,
    session: Db,
    user: CurrentUser,
    type: Words = "",
    person: Words = "",
    object: Words = "",
    days: Days = "",
    before: Annotated[int | None, Query(ge=1, le=MAX_NUMBER)] = None,
) -> Response:
    query = _wish(type, person, object, days).query()
    if before is not None:
        query = query.where(AuditLog.id < before)
    rows = session.scalars(query.order_by(AuditLog.id.desc()).limit(SHOWN + 1)).all()
    kept = {"type": type, "person": person, "object": object, "days": days}
    values: dict[str, Any] = {
        "rows": rows[:SHOWN],
        "older": urlencode(kept | {"before": rows[SHOWN - 1].id}) if len(rows) > SHOWN else None,
        "wish": kept,
        "types": audit.types(session),
        "export": urlencode(kept),
        "any": bool(rows) or session.scalar(select(AuditLog.id).limit(1)) is not None,
    }
    return render(request, "audit.html", **values)


@pages.get("/admin/audit/export")
def export(user: CurrentUser, type: Words = "", person: Words = "", object: Words = "", days: Days = "") -> Response:
    """The filtered events as JSON lines, oldest first."""
    headers = {"content-disposition": 'attachment; filename="audit.jsonl"'}
    return StreamingResponse(audit.lines(_wish(type, person, object, days)), media_type="application/jsonl", headers=headers)
