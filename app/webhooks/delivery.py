"""Sends an event to an endpoint: one POST, signed by the rules of Standard Webhooks (https://www.standardwebhooks.com)."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import ssl
import time
import uuid
from collections.abc import Sequence
from typing import Any

from sqlalchemy import select

from app import leases
from app.db import transaction
from app.errors import StudioError
from app.kit import addresses
from app.kit.secret import is_here
from app.languages import gettext
from app.tables import JSON, WebhookEndpoint
from app.webhooks import service as webhooks

log = logging.getLogger(__name__)

NO_KEY = "The data worker's machine has no key to sign with. Copy secrets/webhooks.key from the data folder of the web process to its own, or set LUTHIER_SECRETS_DIR."
SECONDS = 10.0
"""How long an endpoint may take to answer."""


def send(delivery_id: uuid.UUID) -> None:
    """Try a delivery that is due, and record what came of it."""
    with transaction() as session:
        delivery = leases.claim(session, webhooks.WORK, delivery_id)
        if delivery is None:
            return
        endpoint, known = session.get_one(WebhookEndpoint, delivery.endpoint_id), is_here(webhooks.KEY)
        keys = secrets(endpoint, session.execute(select(leases.now())).scalar_one().timestamp()) if known else []
    status_code, error = attempt(endpoint.url, delivery.event, keys) if known else (None, NO_KEY)
    with transaction() as session:
        webhooks.record(session, delivery, status_code, error)


def secrets(endpoint: WebhookEndpoint, now: float) -> list[str]:
    """The secrets that sign now, the newest first."""
    old = endpoint.old_until is not None and endpoint.old_until.timestamp() > now
    return [webhooks.signing_secret(endpoint), *([webhooks.signing_secret(endpoint, 1)] if old else [])]


def attempt(url: str, event: JSON, keys: Sequence[str]) -> tuple[int | None, str | None]:
    """(status of the answer, why it was not taken). Only 2xx takes an event; redirects are not followed."""
    import httpx

    body = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
    try:
        webhooks.check_url(url)
        where, more = addresses.pinned(url)
        more["headers"] |= {"content-type": "application/json", "user-agent": "Luthier", **signed(event["id"], body, keys)}
        options: dict[str, Any] = {
            "timeout": SECONDS,
            "follow_redirects": False,
            "trust_env": False,
            "verify": ssl.create_default_context(),
        }
        with httpx.Client(**options) as client, client.stream("POST", where, content=body.encode(), **more) as answer:
            code = answer.status_code
    except StudioError as fault:
        return None, fault.message
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as fault:
        return None, gettext("It could not be reached (%(reason)s).", reason=type(fault).__name__)
    return code, None if 200 <= code < 300 else gettext("It answered %(code)s.", code=code)


def signed(event_id: str, body: str, keys: Sequence[str], at: int | None = None) -> dict[str, str]:
    """The headers that prove where an event comes from, one signature for each secret."""
    stamp = str(int(time.time()) if at is None else at)
    marks = [hmac.new(base64.b64decode(key.removeprefix("whsec_")), f"{event_id}.{stamp}.{body}".encode(), hashlib.sha256) for key in keys]
    signature = " ".join(f"v1,{base64.b64encode(mark.digest()).decode()}" for mark in marks)
    return {"webhook-id": event_id, "webhook-timestamp": stamp, "webhook-signature": signature}
