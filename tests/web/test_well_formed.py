"""What is refused before any route sees it, and that the refusal names the field."""

from __future__ import annotations

import json
import time

import pytest

from app.errors import BadField, BadRequest
from app.web.well_formed import MAX_CONTAINERS, MAX_DEPTH, check_address, check_form, check_json


def nested(levels: int) -> bytes:
    return b'{"a": ' + b"[" * levels + b"]" * levels + b"}"


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        (b'{"a": {"b": ["\\ud800"]}}', "a.b.0", "surrogate"),
        (b'{"a": "x\\udc00\\ud83d"}', "a", "surrogate"),
        (b'{"a": {"\\ud800": 1}}', "a", "surrogate"),
        (b'{"a": "\\u0000"}', "a", "NUL"),
        (b'{"a": NaN}', "a", "NaN"),
        (b'{"a": [1, -Infinity]}', "a.1", "infinity"),
        (b'{"a": 1e400}', "a", "larger"),
        (b'{"a": -1E+999}', "a", "larger"),
        (b'{"a": 9223372036854775808}', "a", "64 bits"),
        (b'{"a": -9223372036854775809}', "a", "64 bits"),
        (b'{"a": ' + b"1" * 401 + b"}", "a", "64 bits"),
        (b'{"b": {"a": ' + b"1" * 5000 + b"}}", "b.a", "64 bits"),
        (b'{"a": 1, "b": {"a": 1, "a": 2}}', "a", "twice"),
        (nested(MAX_DEPTH), "a", f"more than {MAX_DEPTH}"),
        (nested(200_000), None, f"more than {MAX_DEPTH}"),
        (b'{"a": "\xed\xa0\x80"}', None, "not UTF-8"),
        (b'{"a": "\xff"}', None, "not UTF-8"),
        ('{"a": "b"}'.encode("utf-16"), None, "not UTF-8"),
        (b'{"a": 1,}', None, "line 1, column 9"),
        (b"[" + b"[]," * MAX_CONTAINERS + b"1]", None, f"more than {MAX_CONTAINERS:,}"),
    ],
)
def test_json_that_nobody_can_store_is_refused_with_the_field(body, param, says):
    began = time.monotonic()
    with pytest.raises(BadField) as caught:
        check_json(body)
    assert says in caught.value.message and caught.value.param == param and caught.value.hint
    assert time.monotonic() - began < 3
    caught.value.message.encode(), (caught.value.param or "").encode()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b'\xef\xbb\xbf{"a": 1}',
        json.dumps(
            {"a": "\U0001f3bb é", "NaN": "Infinity 1e400", "b": ["12345678901234567890", 2**63 - 1, -(2**63), 1.7e308, 1e-400]}
        ).encode(),
        '{"ש": "٣"}'.encode(),
        nested(MAX_DEPTH - 1),
        json.dumps([{"role": "user", "content": "[{("}] * 2000).encode(),
    ],
)
def test_json_that_means_one_thing_passes(body):
    check_json(body)


def test_addresses_and_forms_are_utf8_without_nul():
    check_address(b"/a%20b/%D7%A9", b"a=%F0%9F%8E%BB&b=1+2&c")
    check_form(b"a=%F0%9F%8E%BB&b=%2500")
    for path, query, param in ((b"/a%00b", b"", None), (b"/%ff", b"", None), (b"/", b"a=1&b=%00", "b"), (b"/", b"a=%ED%A0%80&b=1", "a")):
        with pytest.raises(BadRequest) as caught:
            check_address(path, query)
        assert caught.value.param == param
    with pytest.raises(BadField, match="in prompt") as caught:
        check_form(b"models=a&prompt=%00")
    assert caught.value.param == "prompt"


def test_a_program_is_told_in_the_shape_of_every_error(api):
    for body in (b'{"model": "\\ud800"}', b'{"model": NaN}', b'{"model": 1, "model": 2}'):
        for path in ("/v1/chat/completions", "/v1/estimates", "/v1/votes", "/v1/prompts"):
            answer = api.post(path, content=body, headers={"content-type": "application/json"})
            assert answer.status_code == 400 and answer.json()["error"]["param"] == "model", (path, body, answer.text)
    big = api.post("/v1/prompts", content=b'"' + b"a" * (33 << 20) + b'"', headers={"content-type": "application/json"})
    assert big.status_code == 413 and big.json()["error"]["code"] == "too_large"


def test_a_person_is_told_on_a_page(client):
    for data, headers in (
        (b"title=%00", {}),
        (b"title=%ff", {}),
        (b"title=a", {"content-type": "application/x-www-form-urlencoded; charset=utf-7"}),
    ):
        kind = {"content-type": "application/x-www-form-urlencoded"} | headers
        answer = client.post("/settings/keys", content=data, headers=kind)
        assert answer.status_code == 400 and "<h1" in answer.text and answer.headers["content-type"].startswith("text/html")


def test_half_an_address_in_the_origin_is_foreign(client):
    for origin in ("http://[", "http://127.0.0.1:8000]", "http://[::1"):
        assert client.post("/theme", data={"theme": "dark"}, headers={"origin": origin}).status_code == 403
