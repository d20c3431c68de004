"""Webhook endpoints, and the deliveries of events to them.

    queued ──claim──▶ running ──taken──▶ succeeded
      ▲                  └──refused──▶ queued, with a later `next_at`; after the last try: failed

An event is written down in the transaction in which it happens, once for each endpoint, and sent by a data worker (`delivery.py`).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import uuid
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy import Select, delete, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app import leases, ownership, queue
from app.errors import BadField
from app.kit import ids
from app.kit.secret import secret
from app.languages import gettext
from app.settings import get_settings
from app.tables import JSON, User, WebhookDelivery, WebhookEndpoint

EVENT_TYPES = (
    "fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled",
    "batch.completed", "batch.failed", "batch.expired", "batch.cancelled", "eval.run.succeeded", "eval.run.failed", "eval.run.canceled",
)  # fmt: skip
PAUSES_SECONDS = (5, 60, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 72_000)
"""Before each further try: three days in all."""
OLD_SECRET = timedelta(hours=24)
KEPT = timedelta(days=30)
"""Deliveries that ended before are removed."""
MAX_ENDPOINTS = 20
"""Of one project."""


# Endpoints --------------------------------------------------------------------------------------------------------------


def create(session: Session, user: User, name: str, url: str, event_types: list[str]) -> WebhookEndpoint:
    """A new endpoint. Raises BadField for an address that this studio sends nothing to, an unknown event type, or one endpoint too many."""
    if len(session.scalars(mine(user)).all()) >= MAX_ENDPOINTS:
        message = gettext("A project has at most %(most)s webhook endpoints.", most=MAX_ENDPOINTS)
        raise BadField(message, hint=gettext("Delete one first."))
    check_url(url)
    endpoint = WebhookEndpoint(id=uuid.uuid4(), owner_id=user.id, project_id=user.project_id)
    _set(endpoint, name, url, event_types)
    session.add(endpoint)
    session.flush()
    session.refresh(endpoint)
    return endpoint


def change(
    session: Session, endpoint: WebhookEndpoint, name: str | None = None, url: str | None = None, event_types: list[str] | None = None
) -> WebhookEndpoint:
    """Change what is given. Raises BadField as `create` does."""
    if url is not None:
        check_url(url)
    before = (endpoint.name, endpoint.url, endpoint.event_types)
    _set(
        endpoint, endpoint.name if name is None else name, url or endpoint.url, endpoint.event_types if event_types is None else event_types
    )
    if (endpoint.name, endpoint.url, endpoint.event_types) != before:
        endpoint.updated_at = func.clock_timestamp()
    session.flush()
    session.refresh(endpoint)
    return endpoint


def _set(endpoint: WebhookEndpoint, name: str, url: str, event_types: list[str]) -> None:
    wrong = [one for one in event_types if one not in EVENT_TYPES]
    if wrong or not event_types:
        raise BadField(
            gettext("This studio has no events %(name)s.", name=repr(wrong[0][:60])) if wrong else gettext("No event type is named."),
            hint=gettext("There are %(names)s.", names=", ".join(EVENT_TYPES)),
            param="event_types",
        )
    if not name.strip():
        raise BadField(gettext("The name is empty."), hint=gettext("Say what it is for."), param="name")
    endpoint.name, endpoint.url, endpoint.event_types = name.strip(), url, [one for one in EVENT_TYPES if one in event_types]


def hosts() -> list[str]:
    """Hosts, some with a port, that LUTHIER_WEBHOOK_HOSTS allows."""
    return [part.lower() for part in get_settings().webhook_hosts.replace(",", " ").split()]


def check_url(url: str) -> None:
    """Raises BadField for an address whose host whoever runs the studio did not list."""
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").lower(), parts.port
    except ValueError:
        raise BadField(gettext("That is no address."), hint=gettext("Write https://host/path."), param="url") from None
    if parts.scheme not in ("http", "https") or not host or parts.username or parts.password:
        message = gettext("That is no address of a web server.")
        raise BadField(message, hint=gettext("Write https://host/path, without a name or password."), param="url")
    allowed = hosts()
    if f"{host}:{port}" not in allowed and not (host in allowed and port in (None, 80, 443)):
        if allowed:
            hint = gettext("It sends them to %(hosts)s; whoever runs it lists hosts in LUTHIER_WEBHOOK_HOSTS.", hosts=", ".join(allowed))
        else:
            hint = gettext("Whoever runs the studio lists the hosts in LUTHIER_WEBHOOK_HOSTS.")
        where = f"{host[:120]}{f':{port}' if port else ''}"
        raise BadField(gettext("This studio sends no webhooks to %(host)s.", host=where), hint=hint, param="url")


def mine(user: User) -> Select[WebhookEndpoint]:
    return ownership.mine(WebhookEndpoint, user)


def get(session: Session, user: User, endpoint_id: uuid.UUID) -> WebhookEndpoint:
    return ownership.owned(session, WebhookEndpoint, user, endpoint_id)


def delete_endpoint(session: Session, endpoint: WebhookEndpoint) -> None:
    """Nothing more is sent to it, what waits included."""
    endpoint.deleted_at = func.clock_timestamp()
    session.execute(delete(WebhookDelivery).where(WebhookDelivery.endpoint_id == endpoint.id))
    session.flush()


def rotate(session: Session, endpoint: WebhookEndpoint, *, keep_old: bool = False) -> WebhookEndpoint:
    """A new signing secret. With `keep_old` the one before signs too for 24 hours."""
    endpoint.generation += 1
    endpoint.old_until = leases.now() + OLD_SECRET if keep_old else None
    endpoint.updated_at = func.clock_timestamp()
    session.flush()
    session.refresh(endpoint)
    return endpoint


KEY = "webhooks"
"""The key of the studio that the secrets of all endpoints are derived from."""


def signing_secret(endpoint: WebhookEndpoint, back: int = 0) -> str:
    """The secret of the endpoint, or that of `back` generations before: `whsec_` and 32 bytes in base64."""
    made = hmac.new(secret(KEY), f"{endpoint.id}.{endpoint.generation - back}".encode(), hashlib.sha256)
    return f"whsec_{base64.b64encode(made.digest()).decode()}"


def to_json(endpoint: WebhookEndpoint) -> JSON:
    return {
        "id": ids.public(ids.WEBHOOK, endpoint.id),
        "object": "webhook_endpoint",
        "name": endpoint.name,
        "url": endpoint.url,
        "event_types": endpoint.event_types,
        "signing_secret_hint": f"whsec_…{signing_secret(endpoint)[-4:]}",
        "created_at": int(endpoint.created_at.timestamp()),
        "updated_at": int(endpoint.updated_at.timestamp()),
    }


# Events -----------------------------------------------------------------------------------------------------------------


def emit(session: Session, project_id: uuid.UUID, event_type: str, object_id: str, key: uuid.UUID | None = None) -> None:
    """Write an event down for every endpoint of the project that wants it, and have it sent after the commit. An event that is
    reported again with the same `key` is sent once."""
    wants = WebhookEndpoint.event_types.contains([event_type])
    query = select(WebhookEndpoint).where(WebhookEndpoint.project_id == project_id, WebhookEndpoint.deleted_at.is_(None), wants)
    for endpoint in session.scalars(query).all():
        deliver_to(session, endpoint, event_type, object_id, key or uuid.uuid4())


def deliver_to(session: Session, endpoint: WebhookEndpoint, event_type: str, object_id: str, key: uuid.UUID) -> uuid.UUID | None:
    """A queued delivery of an event to one endpoint; None where there is one of this event."""
    made = insert(WebhookDelivery).values(id=uuid.uuid4(), endpoint_id=endpoint.id, event_key=key, event={})
    found = session.execute(
        made.on_conflict_do_nothing(index_elements=["endpoint_id", "event_key"]).returning(WebhookDelivery.id, WebhookDelivery.created_at)
    ).one_or_none()
    if found is None:
        return None
    delivery = session.get_one(WebhookDelivery, found.id)
    delivery.event = {
        "id": f"evt_{found.id.hex}", "object": "event", "type": event_type, "created_at": int(found.created_at.timestamp()),
        "data": {"id": object_id},
    }  # fmt: skip
    session.flush()
    queue.enqueue(session, queue.WEBHOOK, delivery.id)
    return delivery.id


def last_deliveries(session: Session, endpoint: WebhookEndpoint, limit: int = 10) -> list[WebhookDelivery]:
    query = select(WebhookDelivery).where(WebhookDelivery.endpoint_id == endpoint.id).order_by(WebhookDelivery.created_at.desc())
    return list(session.scalars(query.limit(limit)))


# Who sends --------------------------------------------------------------------------------------------------------------


def _died(session: Session, delivery: WebhookDelivery, how: str) -> None:
    if not leases.requeue(session, WORK, delivery, died=True):
        delivery.status, delivery.finished_at = "failed", session.scalar(select(leases.now()))
        delivery.error = f"Its worker {how} That was death {delivery.deaths}."


WORK = leases.Work(
    WebhookDelivery, queue.WEBHOOK, waits_as="queued", runs_as="running", since=WebhookDelivery.next_at, on_death=_died,
    due=WebhookDelivery.next_at <= leases.now(),
)  # fmt: skip


def record(session: Session, delivery: WebhookDelivery, status_code: int | None, error: str | None) -> None:
    """What came of a try: the end, or when the next one is due."""
    tries, ended = delivery.tries + 1, leases.now()
    values: dict[str, Any] = {"tries": tries, "status_code": status_code, "error": error}
    if error is None:
        values |= {"status": "succeeded", "finished_at": ended}
    elif tries > len(PAUSES_SECONDS):
        values |= {"status": "failed", "finished_at": ended}
    else:
        values |= {"status": "queued", "next_at": leases.now() + timedelta(seconds=PAUSES_SECONDS[tries - 1])}
    leases.finish_if_held(session, WORK, delivery.id, delivery.fence, **values)


def reap(session: Session) -> dict[str, int]:
    """One round of the reaper, which sends what is due again and forgets what ended long ago."""
    old = select(WebhookDelivery.id).where(WebhookDelivery.finished_at < leases.now() - KEPT).limit(1000)
    session.execute(delete(WebhookDelivery).where(WebhookDelivery.id.in_(old)).execution_options(synchronize_session=False))
    return leases.reap(session, WORK)
