"""Reads the input file of a batch: one request per line.

{"custom_id": "row-1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": …, "messages": …}}
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

MAX_REQUESTS = 50_000
MAX_BYTES = 200_000_000
MAX_CUSTOM_ID = 512  # characters
MAX_ERRORS = 100
"""Errors that are told of one file."""


class RequestPlace(NamedTuple):
    """Where a request is in the file: line from 1, offset and length in bytes."""

    line: int
    offset: int
    bytes: int
    custom_id: str


@dataclass
class FoundRequests:
    """The requests of a file, or what is wrong with it. `model` is the one that all of them name."""

    places: list[RequestPlace] = field(default_factory=list)
    errors: list[dict[str, Any]] = field(default_factory=list)
    model: str | None = None


class _WrongLine(ValueError):
    """What is wrong with a line: a code, the message, the field."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.param = code, param


def find(path: Path, endpoint: str) -> FoundRequests:
    """Check every line. At most `MAX_ERRORS` errors are told, each with its line."""
    found, seen, models, offset = FoundRequests(), set[str](), set[Any](), 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            begin, offset = offset, offset + len(raw)
            if not raw.strip():
                continue
            try:
                request = _checked(raw, endpoint, seen)
            except _WrongLine as wrong:
                found.errors.append({"code": wrong.code, "message": str(wrong), "line": number, "param": wrong.param})
                if len(found.errors) >= MAX_ERRORS:
                    break
                continue
            seen.add(request["custom_id"])
            models.add(request["body"].get("model"))
            found.places.append(RequestPlace(number, begin, len(raw), request["custom_id"]))
            if len(found.places) > MAX_REQUESTS:
                message = f"The file has more than {MAX_REQUESTS:,} requests. Split it."
                found.errors.append({"code": "too_many_requests", "message": message, "line": number, "param": None})
                break
    if not found.places and not found.errors:
        found.errors.append({"code": "empty_file", "message": "The file has no requests.", "line": None, "param": None})
    only = next(iter(models)) if len(models) == 1 else None
    found.model = only if isinstance(only, str) else None
    return found


def body_of(path: Path, place: RequestPlace) -> dict[str, Any]:
    """The body of one request that `find` has found."""
    with path.open("rb") as file:
        file.seek(place.offset)
        body: dict[str, Any] = json.loads(file.read(place.bytes))["body"]
    return body


def _checked(raw: bytes, endpoint: str, seen: set[str]) -> dict[str, Any]:
    try:
        given = json.loads(raw)
    except (ValueError, RecursionError):
        raise _WrongLine("invalid_json_line", "This line is not JSON.") from None
    if not isinstance(given, dict):
        raise _WrongLine("invalid_request", "A request is a JSON object.")
    name = given.get("custom_id")
    if not isinstance(name, str) or not 0 < len(name) <= MAX_CUSTOM_ID:
        raise _WrongLine("invalid_custom_id", f"custom_id is a text of 1 to {MAX_CUSTOM_ID} characters.", "custom_id")
    if name in seen:
        raise _WrongLine("duplicate_custom_id", f"The custom_id {name[:80]!r} was used on an earlier line.", "custom_id")
    if given.get("method") != "POST":
        raise _WrongLine("invalid_method", "The method is POST.", "method")
    if given.get("url") != endpoint:
        raise _WrongLine("invalid_url", f"The url is {endpoint}, the endpoint of this batch.", "url")
    body = given.get("body")
    if not isinstance(body, dict):
        raise _WrongLine("invalid_request", "The body is a JSON object.", "body")
    if body.get("stream"):
        raise _WrongLine("invalid_request", "An answer in a batch is not streamed.", "body.stream")
    return given
