"""Validates every request before a route sees it.

URLs and forms are UTF-8 without NUL. JSON is UTF-8 and unambiguous: no duplicate key, no lone surrogate, no NUL, no NaN or
infinity, integers of 64 bits, and limited nesting. What Postgres, a float or a recursion would fail on later is refused here with
a 400 that names the field.
"""

from __future__ import annotations

import json
import math
import re
from email.message import Message as Header
from typing import Any
from urllib.parse import unquote_to_bytes

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import BadField, BadRequest
from app.kit.humanize import human_number
from app.languages import gettext, mark

MAX_DEPTH = 128
"""Nesting of lists and objects in a body: more than in any row (`json_safe.DEEPEST`), and few enough for every recursion."""
MAX_CONTAINERS = 1_000_000
"""Lists and objects in a body: each takes a hundred times the memory of its text."""
MIN_INTEGER, MAX_INTEGER = -(2**63), 2**63 - 1

_SUSPECT = re.compile(r"\\u(?:[dD][89a-fA-F]|0000)|NaN|Infinity|\d{19}|[eE]\+?\d{3}")
"""Matches somewhere in every text with a bad value; most texts do not match, and are not walked through."""
_SURROGATE = re.compile("[\ud800-\udfff]")
_NUL = mark("a NUL character, which no database can store")
_NO_UTF8 = mark("bytes that are not UTF-8")
_HALF_PAIR = mark("half of a surrogate pair, which is no character")
_IN_PATH = mark("The path of this address holds %(what)s.")
_IN_QUERY = (mark("The query of this address holds %(what)s."), mark("The query of this address holds %(what)s, in %(field)s."))
_IN_FORM = (mark("The form holds %(what)s."), mark("The form holds %(what)s, in %(field)s."))
"""Without the field that it is in, and with it."""
_FORMS = ("application/x-www-form-urlencoded", "multipart/form-data")


class WellFormed:
    """Refuses malformed requests. JSON and plain forms are read completely here, and passed on unchanged; multipart forms and the
    bytes of uploads are passed through as a stream."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        check_address(scope.get("raw_path") or b"", scope["query_string"])
        kind, charset = _content_type(Headers(scope=scope).get("content-type", ""))
        if kind in _FORMS and charset not in ("utf-8", "utf8"):
            message = gettext("A form cannot be sent in the charset %(charset)s.", charset=repr(charset[:40]))
            raise BadRequest(message, hint=gettext("Send it in UTF-8."), code="not_utf8")
        if kind == _FORMS[0] or _is_json(kind):
            body, rest = await _whole(receive)
            check_json(body) if _is_json(kind) else check_form(body)
            receive = rest
        await self.app(scope, receive, send)


def _content_type(text: str) -> tuple[str, str]:
    """The media type in lower case and the charset, as FastAPI reads them."""
    if not text:
        return "", "utf-8"
    header = Header()
    header["content-type"] = text
    charset = header.get_param("charset", "utf-8")
    return header.get_content_type(), charset.lower() if isinstance(charset, str) else "?"


def _is_json(kind: str) -> bool:
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


async def _whole(receive: Receive) -> tuple[bytes, Receive]:
    """The body, and a `receive` that replays it in one piece. A client's disconnect is passed on as it came."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            break
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            message = {"type": "http.request", "body": b"".join(parts), "more_body": False}
            break
    waiting = [message]

    async def again() -> Message:
        return waiting.pop() if waiting else await receive()

    return message.get("body", b""), again


# Addresses and forms --------------------------------------------------------------------------------------------------


def check_address(path: bytes, query: bytes) -> None:
    """Raises BadRequest for a path or query that contains a NUL or is not UTF-8."""
    _check_text(unquote_to_bytes(path), (_IN_PATH, _IN_PATH))
    _check_text(unquote_to_bytes(query), _IN_QUERY, query)


def check_form(body: bytes) -> None:
    """Raises BadField, naming the field, for an urlencoded form that contains a NUL or is not UTF-8."""
    _check_text(unquote_to_bytes(body), _IN_FORM, body)


def _check_text(text: bytes, said: tuple[str, str], fields: bytes = b"") -> None:
    bad = _bad_bytes(text)
    if not bad:
        return
    name = next((part.partition(b"=")[0] for part in fields.split(b"&") if _bad_bytes(unquote_to_bytes(part))), b"")
    param = unquote_to_bytes(name).decode("utf-8", "replace").replace("\0", "�")[:80] or None
    where = gettext(said[1], what=gettext(bad), field=param) if param else gettext(said[0], what=gettext(bad))
    raise BadField(where, hint=gettext("Remove it and send the request again."), param=param)


def _bad_bytes(text: bytes) -> str:
    if b"\0" in text:
        return _NUL
    try:
        text.decode()
    except UnicodeDecodeError:
        return _NO_UTF8
    return ""


# JSON -----------------------------------------------------------------------------------------------------------------


def check_json(body: bytes) -> None:
    """Raises BadField for a body that is no JSON or has values that cannot be stored or computed with. An empty body passes."""
    if not body:
        return
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _invalid(gettext("byte %(place)s is not UTF-8", place=error.start + 1)) from None
    containers = text.count("[") + text.count("{")
    if containers > MAX_CONTAINERS:
        message = gettext("The body holds more than %(most)s lists and objects.", most=human_number(MAX_CONTAINERS))
        raise BadField(message, hint=gettext("Send less at once."))
    try:
        value = _parsed(text)
    except RecursionError:
        raise _too_deep(None) from None
    if containers > MAX_DEPTH or _SUSPECT.search(text):
        _check_values(value)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        reason = gettext("%(reason)s, at line %(line)s, column %(column)s", reason=error.msg, line=error.lineno, column=error.colno)
        raise _invalid(reason) from None
    except ValueError:  # Python parses no integer of more than 4,300 digits; twenty are too many too, and are reported with their path
        return json.loads(text, object_pairs_hook=_unique, parse_int=lambda digits: int(digits[:20]))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                message = gettext("%(key)s stands twice in one object.", key=_shown(name))
                raise BadField(message, hint=gettext("Send each key once."), param=_shown(name), code="invalid_json")
            seen.add(name)
    return found


def _invalid(reason: str) -> BadField:
    message = gettext("The body is not valid JSON: %(reason)s.", reason=reason)
    return BadField(message, hint=gettext("Send a JSON object in UTF-8."), code="invalid_json")


Path = tuple["Path", str | int] | None
"""Path of a value: the path of its container, and its key there."""


def _check_values(value: Any) -> None:
    waiting: list[tuple[Any, int, Path]] = [(value, 0, None)]
    while waiting:
        one, depth, path = waiting.pop()
        if isinstance(one, dict | list):
            if depth == MAX_DEPTH:
                raise _too_deep(path)
            for key, item in one.items() if isinstance(one, dict) else enumerate(one):
                if isinstance(key, str) and (fault := _bad_text(key)):
                    raise _bad_value(path, gettext("A key there holds %(what)s.", what=gettext(fault)))
                waiting.append((item, depth + 1, (path, key)))
        elif isinstance(one, str):
            if fault := _bad_text(one):
                raise _bad_value(path, gettext("It holds %(what)s.", what=gettext(fault)))
        elif isinstance(one, float):
            if not math.isfinite(one):
                raise _bad_value(
                    path, gettext("It should be a number that ends: NaN and infinity are none, nor is what is larger than 1.8e308.")
                )
        elif isinstance(one, int) and not MIN_INTEGER <= one <= MAX_INTEGER:
            raise _bad_value(path, gettext("It should be a whole number of at most 64 bits."))


def _bad_text(text: str) -> str:
    if "\0" in text:
        return _NUL
    return _HALF_PAIR if not text.isascii() and _SURROGATE.search(text) else ""


def _bad_value(path: Path, reason: str) -> BadField:
    name = _name(path)
    message = f"{name}: {reason}" if name else gettext("The body: %(reason)s", reason=reason)
    return BadField(message, hint=gettext("Correct it and send the request again."), param=name)


def _too_deep(path: Path) -> BadField:
    return BadField(
        gettext("The body nests lists and objects more than %(most)s levels deep.", most=MAX_DEPTH),
        hint=gettext("Send it flatter."),
        param=(_name(path) or "").split(".")[0] or None,
    )


def _name(path: Path) -> str | None:
    parts: list[str] = []
    while path is not None:
        path, key = path
        parts.append(_shown(str(key)))
    return ".".join(reversed(parts))[:200] or None


def _shown(key: str) -> str:
    return key[:80].replace("\0", "�").encode("utf-8", "replace").decode()
