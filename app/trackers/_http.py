"""Requests to the server of a tracker: JSON to an address that was looked up once; redirects and the environment's proxies are not followed."""

from __future__ import annotations

import json
import ssl
from collections.abc import Mapping
from typing import Any

from app.errors import Unavailable
from app.kit import addresses
from app.kit.addresses import Address

SECONDS = 20.0
"""How long a server may take to answer."""
MAX_ANSWER_BYTES = 4 << 20


class Refusal(Unavailable):
    """A server's own answer of an error; `name` is what it calls it."""

    def __init__(self, message: str, status_code: int, name: str) -> None:
        super().__init__(message, code="tracker_refused", hint="The studio tries again.")
        self.status_code, self.name = status_code, name


def ask(title: str, server: Address, method: str, path: str, headers: Mapping[str, str], **request: Any) -> dict[str, Any]:
    """The JSON that a server answers. Raises Refusal for a status other than 2xx, Unavailable for one that is unreachable."""
    import httpx

    try:
        where, more = addresses.pinned(f"{server.url}{path}")
        more["headers"] |= {"user-agent": "Luthier", **headers}
        options: dict[str, Any] = {
            "timeout": SECONDS,
            "follow_redirects": False,
            "trust_env": False,
            "verify": ssl.create_default_context() if server.url.startswith("https:") else False,
        }
        with httpx.Client(**options) as client, client.stream(method, where, **more, **request) as answer:
            body = b""
            for part in answer.iter_bytes():
                body += part
                if len(body) > MAX_ANSWER_BYTES:
                    raise Unavailable(f"{title} at {server.host} answered more than {MAX_ANSWER_BYTES >> 20} MiB.")
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as fault:
        raise Unavailable(
            f"{title} at {server.host} cannot be reached ({type(fault).__name__}).",
            hint="The studio tries again.",
            code="tracker_unreachable",
        ) from None
    return _read(title, server, answer.status_code, body)


def _read(title: str, server: Address, status: int, body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body) if body else {}
    except ValueError:
        found = None
    if not 200 <= status < 300:
        told = found if isinstance(found, dict) else {}
        name, message = str(told.get("error_code", "")), str(told.get("message") or told.get("error") or "")
        said = ": ".join(part for part in (name, message[:200]) if part)
        raise Refusal(f"{title} at {server.host} answered {status}{f' ({said})' if said else ''}.", status, name)
    if not isinstance(found, dict):
        raise Unavailable(f"{title} at {server.host} answered something that is no JSON object.")
    return found
