"""Changes to a valid request, drawn by a seeded generator."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from urllib.parse import quote, urlencode

from tests.fuzz.asgi import Headers, Raw

Pairs = list[tuple[str, str]]


class Token(str):
    """JSON that `json.dumps` would not write: it stands in the text as it is."""


def deep(levels: int, text: bool = False) -> Any:
    if text:
        return Token("[" * levels + "]" * levels)
    found: Any = []
    for _ in range(levels):
        found = [found]
    return found


LONG = "a" * 1_000_000
TEXTS: list[str] = [
    "", " ", "\n", "\0", "a\0b", "\ud800", "x\udfff", "null", "true", "[]", "{}", "-1", "0", "1.5", "1e400", "NaN", "-Infinity", "٣", "²", "１２", "½",
    "\u202e\u200babc", "שלום", "é", "\U0001f3bb", "e\u0301" * 40, "0001-01-01T00:00:00Z", "9999-12-31T23:59:59Z", "275760-09-13", "-300000-01-01",
    "9223372036854775807", "9223372036854775808", "-9223372036854775809", "1" + "0" * 400, "1" * 5000, "2147483648", "../../etc/passwd", "/etc/passwd", "a/b/c",
    "." , "..", "%00", "%ff", "%", "<script>", "{{7*7}}", "' OR 1=1 --", "a" * 300, "a" * 5000, "é" * 5000, "/" * 3000, LONG,
    "ds-" + "0" * 32, "ftjob-" + "f" * 32, "model-" + "0" * 32, "file-x", "eval-" + "0" * 31, "ftckpt_" + "0" * 32, "ft:a:b:c:d:ckpt-step-" + "9" * 30,
    "00000000-0000-0000-0000-000000000000", "bytes=0-", "\x1b[2J", "\r\nx: y", "tiny@0.5", "tiny@nan", "tiny@" + "9" * 400, "*", "None",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 2**64, 10**18, 10**400, 1.5, -0.0, 1e-320, 1e308, [], {}, [[]], [None], [1, "a"], [{}], {"": 1},
    {"a": None}, {"name": ["a"]}, {"name": {}}, {"type": "text"}, {"id": 10**30}, ["a"] * 300, [0] * 5000, {str(i): i for i in range(2000)}, deep(60), deep(150),
    Token("NaN"), Token("Infinity"), Token("-Infinity"), Token("1e400"), Token("-1e999"), Token("1" * 5000), Token("0.1" + "1" * 2000), Token("1E+2"),
    Token('{"a": 1, "a": 2}'), Token('"\\ud83d"'), Token('"\\u0000"'), Token('"\\udc00\\ud800"'), Token("[1,"), deep(100_000, text=True),
    *TEXTS,
]  # fmt: skip
KEYS = ["", "a", "\0", "\ud800", "__proto__", "model", "id", "name", "a" * 3000, "é", "1"]
RAW_BODIES: list[bytes] = [
    b"", b" ", b"null", b"0", b'""', b"[]", b"[[]]", b"true", b"{", b"}", b"{]", b'{"a":}', b'{"a":1,}', b"{'a':1}", b"\xff\xfe{}", b'\xef\xbb\xbf{}', b'{"a": "\xed\xa0\x80"}',
    b'{"model": "\xff\xff"}', b'{"model": "\xc3("}', "{}".encode("utf-16"), "{}".encode("utf-32"), b"\x00", b"a=%ff&b=%zz", b"=&=&=", b"a" * 100_000, b"[" * 100_000, b'{"a":' * 100_000,
    b"1" * 10_000, b"NaN", b"Infinity", b"-", b'{"a":1}{"a":1}', b'"\\ud800"', b"\x1f\x8b\x08\x00", b"--x\r\n\r\n", b"&" * 5000, b";".join([b"a=1"] * 3000), b"&".join([b"a=1"] * 3000),
]  # fmt: skip
TYPES = [
    b"application/json", b"application/json; charset=utf-16", b"application/x-www-form-urlencoded", b"application/x-www-form-urlencoded; charset=utf-7", b"multipart/form-data",
    b"multipart/form-data; boundary=x", b"multipart/form-data; boundary=fuzz; charset=unicode_escape", b"multipart/form-data; boundary=" + b"x" * 300, b"multipart/form-data; boundary=\xe9", b"text/plain", b"application/vnd.api+json", b"application/octet-stream", b"", b"a", b"/",
    b"application/json;;;", b"\xff", b"application/offset+octet-stream",
]  # fmt: skip
HEADERS: list[tuple[bytes, list[bytes]]] = [
    (b"accept", [b"text/html", b"application/json", b"text/event-stream", b"*/*;q=x", b"\xe9", b""]),
    (b"accept-encoding", [b"gzip", b"gzip;q=nan", b"br", b"\xff"]),
    (b"accept-language", [b"\xe9"]),
    (b"content-length", [b"-1", b"x", b"1" * 50, b"\xb2", b"0", b"99999999999"]),
    (b"content-encoding", [b"gzip", b"x"]),
    (b"cookie", [b"luthier=\xe9", b"luthier", b"; ; =", b"messages=\xff", b"luthier_messages=x.y.z", b"theme=\xe9"]),
    (b"authorization", [b"Bearer \xe9", b"Bearer", b"Bearer sk-luthier-" + b"\xb2" * 32 + b"-x", b"Basic \xff", b"\t", b"Bearer  "]),
    (b"hx-request", [b"true", b"\xe9"]),
    (b"idempotency-key", [b"", b"\xe9", b"a" * 255, b"a" * 256, b"k" * 9000, b"\x01"]),
    (b"if-none-match", [b'"', b"*", b"\xe9", b'W/"a", "b']),
    (b"if-modified-since", [b"x", b"Mon, 01 Jan 0001 00:00:00 GMT", b"Fri, 31 Dec 9999 23:59:60 GMT", b"Thu, 01 Jan 99999 00:00:00 GMT"]),
    (b"if-range", [b"x", b"Mon, 01 Jan 0001 00:00:00 GMT"]),
    (b"last-event-id", [b"-1", b"x", b"9" * 30, b"\xb2", b"", b"9223372036854775808", b"1e9"]),
    (b"range", [b"bytes=0-", b"bytes=-1", b"bytes=9" + b"9" * 4000 + b"-", b"bytes=a-b", b"x=0-1", b"bytes=" + b"0-0," * 200, b"\xe9"]),
    (b"x-forwarded-for", [b"\xe9", b"x" * 5000, b"::1%eth0"]),
    (b"x-request-id", [b"\xe9" * 12, b"a" * 9000, b"ab"]),
    (b"x-csrf-token", [b"", b"x.y", b".", b"a" * 9000]),
    (b"upload-length", [b"-1", b"x", b"\xb2", b"9" * 30, b"0", b""]),
    (b"upload-offset", [b"-1", b"x", b"\xb2", b"9" * 18, b"9" * 30]),
    (b"upload-metadata", [b"filename", b"filename \xe9", b"filename AA==", b"filename 7aCA", b"filename YS5qc29ubA==,filename YS5qc29ubA==", b"," * 900, b"filename " + b"YWFh" * 2000]),
    (b"tus-resumable", [b"", b"2.0.0", b"\xe9"]),
    (b"sec-fetch-site", [b"\xe9", b"same-origin"]),
    (b"origin", [b"http://[", b"\xe9", b"http://127.0.0.1:99999999", b"null"]),
    (b"host", [b"[", b"127.0.0.1:x", b"\xe9", b"127.0.0.1:99999999", b""]),
]  # fmt: skip
"""What a request is sent with besides. `x-csrf-token` and cookies end most requests at the door, which must hold too."""


SHARP: list[Any] = ["\ud800", "a\0", 10**400, Token("NaN"), Token("1e400"), ["a"], {}, 2**63, "a" * 5000, -1, "", True]
SHARP_TEXTS = ["\ud800", "a\0", "9223372036854775808", "1" * 5000, "²", "a" * 5000, "", "-1"]
"""What every place of every request is tried with before chance has its turn."""


@dataclass(frozen=True)
class Parts:
    """A valid request in parts. At most one of `json`, `form` and `multipart` is given; `body` is sent as it is."""

    method: str
    path: str
    params: dict[str, str] = field(default_factory=dict)
    query: Pairs = field(default_factory=list)
    json: Any = None
    form: Pairs | None = None
    multipart: list[tuple[str, str | None, bytes]] | None = None  # name, file name, bytes
    body: bytes | None = None
    headers: Headers = field(default_factory=list)
    known_query: tuple[str, ...] = ()
    """Parameters that the route's signature names."""


def raw(parts: Parts, door: Headers) -> Raw:
    """The bytes of a request. `door` are the headers that let it in."""
    address = parts.path
    for name, value in parts.params.items():
        address = address.replace(f"{{{name}}}", quote(value, safe="/:", errors="surrogatepass"))
    headers, body = [*door, *parts.headers], parts.body or b""
    if parts.json is not None and parts.body is None:
        body = dumps(parts.json).encode("utf-8", "surrogatepass")
        headers.append((b"content-type", b"application/json"))
    elif parts.form is not None and parts.body is None:
        body = urlencode(parts.form, errors="surrogatepass").encode()
        headers.append((b"content-type", b"application/x-www-form-urlencoded"))
    elif parts.multipart is not None and parts.body is None:
        body = _multipart(parts.multipart)
        headers.append((b"content-type", b"multipart/form-data; boundary=fuzz"))
    if not any(name == b"content-length" for name, _ in headers):
        headers.append((b"content-length", str(len(body)).encode()))
    return Raw(parts.method, address.encode("latin-1"), urlencode(parts.query, errors="surrogatepass").encode(), headers, body)


def dumps(value: Any) -> str:
    """JSON with its `Token`s as they are."""
    tokens: list[Token] = []

    def mark(one: Any) -> Any:
        if isinstance(one, Token):
            tokens.append(one)
            return f"@@{len(tokens) - 1}@@"
        if isinstance(one, dict):
            return {key: mark(item) for key, item in one.items()}
        return [mark(item) for item in one] if isinstance(one, list) else one

    text = json.dumps(mark(value))
    for place, token in enumerate(tokens):
        text = text.replace(f'"@@{place}@@"', token)
    return text


def _multipart(parts: list[tuple[str, str | None, bytes]]) -> bytes:
    found = b""
    for name, filename, data in parts:
        more = "" if filename is None else f'; filename="{filename}"'
        found += f'--fuzz\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode("utf-8", "surrogatepass") + data + b"\r\n"
    return found + b"--fuzz--\r\n"


class Mutator:
    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)

    def sharp(self, parts: Parts) -> list[Callable[[Parts], Parts]]:
        """Each place of the request with each sharp value, in an order drawn by the seed."""
        ways = [partial(_set_json, place, value) for place in range(len(list(_places(parts.json)))) for value in SHARP]
        for text in SHARP_TEXTS:
            ways += [partial(_set_form, name, text) for name, _ in parts.form or ()]
            ways += [partial(_set_query, name, text) for name in {*parts.known_query, *(name for name, _ in parts.query)}]
            ways += [partial(_set_param, name, text) for name in parts.params]
        ways.sort(key=repr)
        self.draw.shuffle(ways)
        return ways

    def mutate(self, parts: Parts) -> Parts:
        for _ in range(self.draw.choices((1, 2, 3), (6, 3, 1))[0]):
            parts = self.draw.choice(self._ways(parts))(parts)
        return parts

    def _ways(self, parts: Parts) -> list[Callable[[Parts], Parts]]:
        ways: list[Callable[[Parts], Parts]] = []
        if parts.json is not None:
            ways += [self._json] * 14
        if parts.form is not None:
            ways += [self._form] * 10
        if parts.multipart is not None:
            ways += [self._parts] * 10
        if parts.params:
            ways += [self._param] * 3
        ways += [self._query] * (6 if parts.known_query else 1)
        ways += [self._header] * 2
        if parts.method not in ("GET", "HEAD"):
            ways += [self._body] * 2
        return ways

    def _text(self) -> str:
        return self.draw.choice(TEXTS)

    def _param(self, parts: Parts) -> Parts:
        name = self.draw.choice(list(parts.params))
        value = parts.params[name]
        changed = self.draw.choice(
            [self._text, self._text, lambda: value[:-1], lambda: value + "0", lambda: value.upper(), lambda: value * 40]
        )()
        return replace(parts, params=parts.params | {name: changed[:60_000]})

    def _query(self, parts: Parts) -> Parts:
        names = [name for name, _ in parts.query] + list(parts.known_query) or [self._key()]
        return replace(parts, query=self._pairs(parts.query, names))

    def _form(self, parts: Parts) -> Parts:
        form = parts.form or []
        return replace(parts, form=self._pairs(form, [name for name, _ in form] or ["a"]))

    def _pairs(self, pairs: Pairs, names: list[str]) -> Pairs:
        name = self.draw.choice(names)
        match self.draw.randrange(8):
            case 0:
                return [pair for pair in pairs if pair[0] != name]
            case 1:
                return [*pairs, (name, self._text())]
            case 2:
                return [*pairs, (self._key(), self._text())]
            case 3:
                return [(self._key() if pair[0] == name else pair[0], pair[1]) for pair in pairs]
            case _:
                return [pair for pair in pairs if pair[0] != name] + [(name, self._text())]

    def _key(self) -> str:
        return self.draw.choice(KEYS)

    def _parts(self, parts: Parts) -> Parts:
        found = list(parts.multipart or [])
        place = self.draw.randrange(len(found)) if found else 0
        match self.draw.randrange(6):
            case 0 if found:
                del found[place]
            case 1 if found:
                found.append(found[place])
            case 2 if found:
                found[place] = (found[place][0], self._text()[:3000], found[place][2])
            case 3 if found:
                found[place] = (self._text()[:3000], *found[place][1:])
            case 4:
                found += [("x", None, b"y")] * self.draw.choice((1, 70, 1200))
            case _ if found:
                found[place] = (
                    *found[place][:2],
                    self.draw.choice([self._text().encode("utf-8", "surrogatepass"), self.draw.choice(RAW_BODIES)]),
                )
        return replace(parts, multipart=found)

    def _header(self, parts: Parts) -> Parts:
        name, values = self.draw.choice(HEADERS)
        return replace(parts, headers=[*[h for h in parts.headers if h[0] != name], (name, self.draw.choice(values))])

    def _body(self, parts: Parts) -> Parts:
        if self.draw.random() < 0.5:  # another content type on the same bytes
            whole = raw(replace(parts, body=None), [])
            return replace(parts, body=whole.body, headers=[*parts.headers, (b"content-type", self.draw.choice(TYPES))])
        if self.draw.random() < 0.5:
            body, kind = self.draw.choice(RAW_BODIES), self._type(parts)
            return replace(parts, body=body, headers=[*parts.headers, (b"content-type", kind)])
        body = bytearray(raw(replace(parts, body=None), []).body)
        for _ in range(self.draw.randrange(1, 4)):
            place = self.draw.randrange(len(body) + 1)
            match self.draw.randrange(3):
                case 0:
                    del body[place:]
                case 1:
                    body[place:place] = self.draw.choice(
                        [b"\xff", b"\0", b'"', b"{", b"\\u", b"\\ud800", b"%00", b"%ED%A0%80", b"&&", b"\r\n"]
                    )
                case _:
                    body[place : place + 1] = bytes([self.draw.randrange(256)])
        return replace(parts, body=bytes(body), headers=[*parts.headers, (b"content-type", self._type(parts))])

    def _type(self, parts: Parts) -> bytes:
        if parts.multipart is not None:
            return b"multipart/form-data; boundary=fuzz"
        return b"application/x-www-form-urlencoded" if parts.form is not None else b"application/json"

    def _json(self, parts: Parts) -> Parts:
        body = copy.deepcopy(parts.json)
        places = list(_places(body))
        if not places or self.draw.random() < 0.05:
            return replace(parts, json=self.draw.choice(VALUES))
        holder, key = self.draw.choice(places)
        match self.draw.randrange(10):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[self._key()] = self.draw.choice(VALUES)
            case 2 if isinstance(holder, dict):
                holder[self._key()] = holder.pop(key)
            case 3:
                holder[key] = [holder[key]]
            case 4:
                holder[key] = {"a": holder[key]}
            case _:
                holder[key] = self.draw.choice(VALUES)
        return replace(parts, json=body)


def _set_json(place: int, value: Any, parts: Parts) -> Parts:
    body = copy.deepcopy(parts.json)
    holder, key = list(_places(body))[place]
    holder[key] = value
    return replace(parts, json=body)


def _set_form(name: str, text: str, parts: Parts) -> Parts:
    return replace(parts, form=[(key, text if key == name else value) for key, value in parts.form or ()])


def _set_query(name: str, text: str, parts: Parts) -> Parts:
    return replace(parts, query=[*(pair for pair in parts.query if pair[0] != name), (name, text)])


def _set_param(name: str, text: str, parts: Parts) -> Parts:
    return replace(parts, params=parts.params | {name: text})


def _places(value: Any) -> Any:
    """Every member of every object and list: (what holds it, its key)."""
    if isinstance(value, dict | list) and not isinstance(value, str):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])
