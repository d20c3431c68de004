"""Requests to an engine: JSON over HTTP, and errors that say whether it is away or refuses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from app.errors import Unavailable

SECONDS = 10.0
"""How long an engine may take to answer."""
SAID_CHARACTERS = 300


class EngineAway(Unavailable):
    """The engine does not answer, or answers with an error that passes."""

    code = "launcher_unavailable"
    usual_hint = "It is asked again."


class EngineRefuses(Unavailable):
    """The engine answers, and does not do what it was asked. `status_code` is its own."""

    code = "launcher_refused"
    usual_hint = "It is asked again."

    def __init__(self, message: str, status_code: int) -> None:
        super().__init__(message)
        self.status_code = status_code


def ask(title: str, method: str, url: str, *, headers: Mapping[str, str] | None = None, verify: Any = True, body: Any = None) -> Any:
    """The JSON that an engine answers. Raises EngineAway and EngineRefuses."""
    import httpx

    try:
        answer = httpx.request(
            method, url, headers=dict(headers or {}), json=body, timeout=SECONDS, verify=verify, follow_redirects=False, trust_env=False
        )
        found = answer.json() if answer.content and answer.status_code < 400 else None
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        raise EngineAway(f"{title} at {url.partition('?')[0]} does not answer ({type(error).__name__}).", hint="Is it running?") from None
    if answer.status_code in (429, 502, 503, 504):
        raise EngineAway(f"{title} answers {answer.status_code}.")
    if answer.status_code >= 300:
        raise EngineRefuses(f"{title} answers {answer.status_code}: {_words(answer.text)}.", answer.status_code)
    return found


def _words(text: str) -> str:
    """What an error says: the message of a JSON object, or the last of a traceback."""
    try:
        told = json.loads(text)
        said = str(told.get("message") or told.get("msg") or text) if isinstance(told, dict) else text
    except ValueError:
        said = text
    return " ".join(said.split())[-SAID_CHARACTERS:].rstrip(".")
