"""Everything that can go wrong in a way a person can act on.

    StudioError ─┬─ BadRequest (400) ─┬─ BadField        one field of a request is wrong
                 │                    ├─ BadData         a dataset's bytes or rows are wrong
                 │                    │   └─ BadTemplate (422)  a model's chat template had to be stopped
                 │                    └─ DoesNotFit      the machine or the model cannot do what is asked
                 ├─ NotSignedIn (401)
                 ├─ Forbidden (403)
                 ├─ NotFound (404)                       also for another person's object
                 ├─ Conflict (409)                       the object is in a state that forbids this
                 ├─ TooLarge (413)
                 ├─ Unsupported (415)
                 ├─ TooMany (429)
                 ├─ Unavailable (503)                    a part of the studio is away; try again
                 └─ DiskFull (507)

An error says what is wrong, where, and what to do. It is raised where the fault is seen and caught once, at the edge:
`app.main` turns it into the page or into `{"error": {message, type, param, code}}`.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from typing import Any

from app.languages import gettext, mark


class StudioError(Exception):
    """An error with a status, a code for programs, and a hint for people.

    `message` says what is wrong and where; `hint` says what to do about it; `param` names the field of the request. Without a
    hint of its own an error has that of its class. `details` are additional fields, `headers` those of the response.
    """

    details: dict[str, Any]
    headers: dict[str, str]
    usual_hint = ""
    status = 500
    code = "internal_error"
    type = "server_error"

    def __init__(self, message: str, *, hint: str = "", param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint or gettext(self.usual_hint)
        self.param = param
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        stop = "." if self.message[-1:].isalnum() and self.hint else ""
        return f"{self.message}{stop} {self.hint}".strip()

    def as_json(self) -> dict[str, Any]:
        """The `error` of a refusal as the OpenAI API has it, in answers and inside event streams."""
        return {"message": str(self), "type": self.type, "param": self.param, "code": self.code}

    def as_problem(self) -> dict[str, Any]:
        """What is stored as the `error` of an object."""
        return {"code": self.code, "message": self.message, "hint": self.hint}


class BadRequest(StudioError):
    status, code, type = 400, "invalid_request", "invalid_request_error"
    usual_hint = mark("Change it and send the request again.")


class BadField(BadRequest):
    code = "invalid_value"


class BadData(BadRequest):
    code = "invalid_data"


class BadTemplate(BadData):
    status, code = 422, "chat_template_stopped"


class DoesNotFit(BadRequest):
    code = "does_not_fit"


class NotSignedIn(StudioError):
    status, code, type = 401, "invalid_api_key", "invalid_request_error"
    usual_hint = mark("Sign in, or send an API key.")


class Forbidden(StudioError):
    status, code, type = 403, "forbidden", "invalid_request_error"
    usual_hint = mark("Ask an admin.")


class NotFound(StudioError):
    status, code, type = 404, "resource_missing", "invalid_request_error"
    usual_hint = mark("Look it up in its list: it may have been deleted.")


class Conflict(StudioError):
    status, code, type = 409, "conflict", "invalid_request_error"
    usual_hint = mark("Look at its state, and try again when that has changed.")


class TooLarge(StudioError):
    status, code, type = 413, "too_large", "invalid_request_error"
    usual_hint = mark("Send less at once.")


class Unsupported(StudioError):
    status, code, type = 415, "unsupported", "invalid_request_error"
    usual_hint = mark("Send it in another form.")


class TooMany(StudioError):
    """Carries `retry_after_seconds`, sent as the `Retry-After` header."""

    status, code, type = 429, "rate_limit_exceeded", "rate_limit_error"
    usual_hint = mark("Wait a moment and try again.")

    def __init__(self, message: str, *, retry_after_seconds: float = 1.0, **rest: str) -> None:
        super().__init__(message, **rest)
        self.retry_after_seconds = retry_after_seconds


class Unavailable(StudioError):
    status, code, type = 503, "unavailable", "server_error"
    usual_hint = mark("Try again in a moment.")


class DiskFull(StudioError, OSError):
    """Also an OSError, so that code that handles a full disk need not know which of the two was raised."""

    status, code, type = 507, "disk_full", "server_error"
    usual_hint = mark("Make room there, then try again.")

    def __init__(self, message: str, *, hint: str = "", param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, hint=hint, param=param, code=code)
        self.errno = errno.ENOSPC


def problem_json(stored: dict[str, Any] | None) -> dict[str, Any] | None:
    """The stored error of an object as the API sends it: with `way_out`, which is what `hint` was called before. It is removed in the
    next version."""
    return stored and {**stored, "way_out": stored.get("hint")}


# Words ---------------------------------------------------------------------------------------------------------------


def plain(message: str) -> str:
    """A message of pydantic's in words without Python terms, as a sentence that ends in a period."""
    text = message.removeprefix("Value error, ").rstrip(".").partition(", unable to parse")[0]
    for term, word in _WORDS.items():
        text = text.replace(term, word)
    return f"{text}."


def field_path(loc: Sequence[str | int], *more: str) -> str:
    """The path of one of pydantic's errors, as `messages.0.content`: without the branches of a union, and without `more`, the
    tags of the union."""
    return ".".join(str(part) for part in loc if part not in more and not _BRANCH.fullmatch(str(part)))


_BRANCH = re.compile(r"str|int|float|bool|(list|dict|literal|function-\w+|constrained-\w+)(\[.*\])?|function-.*")

_WORDS = {
    "Input should be": "It should be",
    "a valid dictionary or object to extract fields from": "a JSON object, as {…}",
    "a valid dictionary": "a JSON object, as {…}",
    "a valid list": "a list, as […]",
    "a valid string": "a text",
    "a valid number": "a number",
    "a valid integer": "a whole number",
    "a valid boolean": "true or false",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "String should have": "It should have",
    "String should match pattern": "It should match",
    "List should have": "It should have",
}
