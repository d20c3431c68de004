"""`/v1/webhook_endpoints`, as `client.webhooks` of OpenAI's client calls them, and the page Settings, Webhooks."""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any

from fastapi import APIRouter, Form, Request
from fastapi.responses import Response

from app import schemas
from app.db import Db, transaction
from app.errors import BadField, NotFound, StudioError, Unavailable
from app.kit import ids
from app.languages import gettext
from app.schemas.openapi import answers
from app.tables import User, WebhookEndpoint
from app.web import templates as web_templates
from app.web.auth import CurrentUser
from app.web.pagination import After, Limit, page
from app.webhooks import delivery
from app.webhooks import service as webhooks

pages = APIRouter()
api = APIRouter(prefix="/v1")
Json = dict[str, Any]
PAGE = "/settings/webhooks"
ONE = "/webhook_endpoints/{webhook_endpoint_id}"


@api.get("/webhook_event_types", operation_id="list_webhook_event_types", responses=answers(schemas.WebhookEventTypes))
def event_types(user: CurrentUser) -> Json:
    """Events that an endpoint can hear of."""
    return {"object": "list", "data": list(webhooks.EVENT_TYPES)}


@api.post("/webhook_endpoints", operation_id="create_webhook_endpoint", responses=answers(schemas.WebhookEndpointWithSecret))
def create(session: Db, user: CurrentUser, order: schemas.CreateWebhookEndpoint) -> Json:
    """Have events of the project sent to an address. The answer has the secret with which they are signed."""
    return _with_secret(webhooks.create(session, user, order.name, order.url, order.event_types))


@api.get("/webhook_endpoints", operation_id="list_webhook_endpoints", responses=answers(schemas.page_of(schemas.WebhookEndpoint)))
def list_endpoints(session: Db, user: CurrentUser, after: After = None, limit: Limit = 20) -> Json:
    """Endpoints of the project, newest first."""
    return page(webhooks.mine(user), after, limit, "desc", webhooks.to_json, session=session, key=ids.parse_webhook)


@api.get(ONE, operation_id="retrieve_webhook_endpoint", responses=answers(schemas.WebhookEndpoint))
def retrieve(session: Db, user: CurrentUser, webhook_endpoint_id: str) -> Json:
    """One endpoint."""
    return webhooks.to_json(_get(session, user, webhook_endpoint_id))


@api.post(ONE, operation_id="update_webhook_endpoint", responses=answers(schemas.WebhookEndpoint))
def update(session: Db, user: CurrentUser, webhook_endpoint_id: str, order: schemas.ChangeWebhookEndpoint) -> Json:
    """Change the name, the address or the events of an endpoint."""
    endpoint = _get(session, user, webhook_endpoint_id)
    return webhooks.to_json(webhooks.change(session, endpoint, order.name, order.url, order.event_types))


@api.delete(ONE, operation_id="delete_webhook_endpoint", responses=answers(schemas.DeletedWebhookEndpoint))
def delete(session: Db, user: CurrentUser, webhook_endpoint_id: str) -> Json:
    """Send nothing more to an endpoint."""
    webhooks.delete_endpoint(session, _get(session, user, webhook_endpoint_id))
    return {"id": webhook_endpoint_id, "object": "webhook_endpoint.deleted", "deleted": True}


@api.post(f"{ONE}/rotate_secret", operation_id="rotate_webhook_secret", responses=answers(schemas.WebhookEndpointWithSecret))
def rotate(session: Db, user: CurrentUser, webhook_endpoint_id: str, order: schemas.RotateWebhookSecret) -> Json:
    """Replace the signing secret of an endpoint."""
    keep_old = order.keep_old_secret_active_for_24_hours
    return _with_secret(webhooks.rotate(session, _get(session, user, webhook_endpoint_id), keep_old=keep_old))


@api.post(f"{ONE}/test", operation_id="test_webhook_endpoint", responses=answers(schemas.WebhookEndpointTest))
def test(user: CurrentUser, webhook_endpoint_id: str, order: schemas.TryWebhookEndpoint) -> Json:
    """Send a sample to an endpoint now, and say what it answered."""
    with transaction() as session:
        endpoint = _get(session, user, webhook_endpoint_id)
    code, error = _sample(endpoint, order.event_type)
    if code is None:
        raise Unavailable(f"The endpoint took no sample. {error}", hint="Check its address, and that it is up.", code="webhook_unreachable")
    return {
        "object": "webhook_endpoint.test", "webhook_endpoint_id": webhook_endpoint_id, "event_type": order.event_type, "status_code": code,
        "success": True,
    }  # fmt: skip


def _sample(endpoint: WebhookEndpoint, event_type: str) -> tuple[int | None, str | None]:
    if event_type not in webhooks.EVENT_TYPES:
        message = gettext("This studio has no events %(name)s.", name=repr(event_type[:60]))
        raise BadField(message, hint=gettext("There are %(names)s.", names=", ".join(webhooks.EVENT_TYPES)), param="event_type")
    prefix = {"batch": ids.BATCH, "eval": ids.EVAL_RUN}.get(event_type.partition(".")[0], ids.JOB)
    event = {
        "id": f"evt_{uuid.uuid4().hex}", "object": "event", "type": event_type, "created_at": int(time.time()),
        "data": {"id": ids.public(prefix, uuid.UUID(int=0))},
    }  # fmt: skip
    return delivery.attempt(endpoint.url, event, delivery.secrets(endpoint, time.time()))


def _get(session: Db, user: User, public_id: str) -> WebhookEndpoint:
    return webhooks.get(session, user, ids.parse_webhook(public_id))


def _with_secret(endpoint: WebhookEndpoint) -> Json:
    return webhooks.to_json(endpoint) | {"signing_secret": webhooks.signing_secret(endpoint)}


# The page ---------------------------------------------------------------------------------------------------------------


@pages.get(PAGE)
def webhooks_page(request: Request, session: Db, user: CurrentUser) -> Response:
    return _page(request, session, user)


def _page(request: Request, session: Db, user: User, fault: StudioError | None = None, **more: Any) -> Response:
    rows = session.scalars(webhooks.mine(user).order_by(WebhookEndpoint.created_at.desc(), WebhookEndpoint.id)).all()
    typed: Json = {"name": "", "url": "", "event_types": list(webhooks.EVENT_TYPES)}
    return web_templates.render(
        request,
        "webhooks.html",
        status_code=fault.status if fault else 200,
        rows=[(webhooks.to_json(one), webhooks.last_deliveries(session, one)) for one in rows],
        hosts=webhooks.hosts(),
        event_types=webhooks.EVENT_TYPES,
        fault=fault,
        **{"typed": typed, "new_secret": None, "new_name": None} | more,
    )


@pages.post(PAGE)
def create_from_page(
    request: Request,
    session: Db,
    user: CurrentUser,
    name: Annotated[str, Form(max_length=200)] = "",
    url: Annotated[str, Form(max_length=2000)] = "",
    event_types: Annotated[list[str] | None, Form()] = None,
) -> Response:
    """The response is the page itself, because the secret is shown once."""
    try:
        made = webhooks.create(session, user, name, url.strip(), event_types or [])
    except StudioError as fault:
        return _page(request, session, user, fault, typed={"name": name, "url": url, "event_types": event_types or []})
    return _page(request, session, user, new_secret=webhooks.signing_secret(made), new_name=made.name)


@pages.post(PAGE + "/{webhook_endpoint_id}/{action}")
def act(request: Request, session: Db, user: CurrentUser, webhook_endpoint_id: str, action: str) -> Response:
    """Send a sample, replace the secret, or delete."""
    endpoint = _get(session, user, webhook_endpoint_id)
    match action:
        case "test":
            code, error = _sample(endpoint, endpoint.event_types[0])
            if error:
                web_templates.flash(request, f"{endpoint.name}: {error}")
            else:
                web_templates.flash(request, gettext("%(name)s: it took the sample and answered %(code)s.", name=endpoint.name, code=code))
        case "rotate":
            webhooks.rotate(session, endpoint, keep_old=True)
            return _page(request, session, user, new_secret=webhooks.signing_secret(endpoint), new_name=endpoint.name)
        case "delete":
            webhooks.delete_endpoint(session, endpoint)
            web_templates.flash(request, gettext("Nothing more is sent to %(name)s.", name=endpoint.name))
        case _:
            raise NotFound(gettext("There is no such action."), hint=gettext("Use the buttons of the page."))
    return _page(request, session, user)
