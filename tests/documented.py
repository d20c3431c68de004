"""Every answer under /v1 that a test gets is checked against the API's document: its status, its type, and each field of its body.
So is every JSON body that was accepted.

`install` puts a layer round every application that is made in this process, so the whole test suite drives the check, whatever
client it uses. Objects are closed for it: a field that is sent and not described is a violation, as is one that is described and
not sent.
"""

from __future__ import annotations

import json
import re
import zlib
from collections import Counter
from functools import cache
from typing import Any, NamedTuple

DOCUMENT, CLOSED = "urn:openapi", "urn:openapi:closed"
checked: Counter[str] = Counter()
"""Answers that were checked, by operation and status."""
violations: list[str] = []
"""What was not as documented. A fixture of `tests/conftest.py` fails the test that finds any."""


class Answer(NamedTuple):
    status: int
    kind: str
    body: bytes


def install() -> None:
    """From now on every application checks what it answers."""
    from app.web import middleware

    plain = middleware.install
    if not hasattr(plain, "checks"):

        def install_and_check(app: Any) -> None:
            plain(app)
            app.add_middleware(Checked)

        install_and_check.checks = True  # type: ignore[attr-defined]
        middleware.install = install_and_check


class Checked:
    """The outermost layer: it sees what the client sees."""

    def __init__(self, app: Any) -> None:
        self.app, self.contract = app, contract()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self.app(scope, receive, send)
            return
        asked, said, start, ended = bytearray(), bytearray(), {}, False

        async def hear() -> Any:
            message = await receive()
            asked.extend(message.get("body", b"") if len(asked) < 1_000_000 else b"")
            return message

        async def tell(message: Any) -> None:
            nonlocal ended
            start.update(message if message["type"] == "http.response.start" else {})
            said.extend(message.get("body", b""))
            ended = message["type"] == "http.response.body" and not message.get("more_body")
            await send(message)

        await self.app(scope, hear, tell)
        if not ended:
            return  # the client left in the middle
        headers = {name.decode().lower(): value.decode("latin-1") for name, value in start["headers"]}
        body = zlib.decompress(said, 31) if headers.get("content-encoding") == "gzip" else bytes(said)
        answer = Answer(start["status"], headers.get("content-type", "").partition(";")[0], body)
        try:
            self.contract.check(scope["method"], scope["path"], answer)
            kind = next((value for name, value in scope["headers"] if name == b"content-type"), b"")  # the first counts, as everywhere
            if asked and answer.status < 300 and kind == b"application/json":
                self.contract.check_request(scope["method"], scope["path"], json.loads(asked))
        except AssertionError as violation:
            violations.append(str(violation))


@cache
def contract() -> Contract:
    from app.main import create_app

    return Contract(create_app())


class Contract:
    """The document of an application, and the check of an answer against it."""

    def __init__(self, app: Any) -> None:
        from referencing import Registry, Resource
        from referencing.jsonschema import DRAFT202012

        from app.schemas.openapi import document, operations

        self.document = document(app)
        self.routes = [(method, route.path_regex, path) for method, path, route in operations(app)]
        documents = {DOCUMENT: self.document, CLOSED: _closed(self.document)}
        resources = [(name, Resource.from_contents(found, default_specification=DRAFT202012)) for name, found in documents.items()]
        self.registry: Any = Registry().with_resources(resources)
        self.validators: dict[str, Any] = {}

    def operation(self, method: str, path: str) -> dict[str, Any] | None:
        """What answers a request; None where nothing is documented."""
        for known, pattern, name in self.routes:
            if known == method.lower() and pattern.match(path):
                found: dict[str, Any] = self.document["paths"][name][known]
                return found
        return None

    def check(self, method: str, path: str, answer: Answer) -> None:
        """Raises AssertionError for an answer that is not as the document says."""
        operation = self.operation("GET" if method == "HEAD" and self.operation(method, path) is None else method, path)
        if operation is None or answer.status in (405, 499):
            return  # nobody is there, at this address or at the other end; or the test itself has put a route there
        name, where = operation["operationId"], f"{method} {path} answered {answer.status}"
        said = operation["responses"].get(str(answer.status))
        assert said is not None, f"{where}, which {name} does not document: {answer.body[:500]!r}"
        if "$ref" in said:
            said = self.document["components"]["responses"][said["$ref"].rsplit("/", 1)[-1]]
        checked[f"{name} {answer.status}"] += 1
        if method == "HEAD" or not answer.body:
            assert method == "HEAD" or not said.get("content"), f"{where} without a body"
            return
        content = said.get("content", {"text/plain": {}}).get(answer.kind)
        assert content is not None, f"{where} with {answer.kind or 'no type'}, which {name} does not document"
        for value in _values(answer):
            self._validate(CLOSED, content["schema"], value, f"{where} ({name})")
            assert (wrong := _without_old_name(value)) is None, f"{where} ({name}): {wrong!r} lacks `way_out`, the old name of its hint"

    def check_request(self, method: str, path: str, body: Any) -> None:
        """Raises AssertionError for a body that was accepted although the document knows no such body. Null is as good as absent."""
        operation = self.operation(method, path)
        if operation is None or not body:
            return
        where = f"{method} {path} ({operation['operationId']}) took a body"
        assert "requestBody" in operation, where
        given = {name: value for name, value in body.items() if value is not None}
        self._validate(
            DOCUMENT, operation["requestBody"]["content"]["application/json"]["schema"], given, f"{where}, wrong by the document"
        )

    def _validate(self, base: str, schema: dict[str, Any], value: Any, where: str) -> None:
        from jsonschema import Draft202012Validator
        from jsonschema.exceptions import best_match
        from jsonschema.validators import extend

        absolute = _absolute(schema, base)
        text = json.dumps(absolute)
        if text not in self.validators:
            kind = (
                extend(Draft202012Validator, type_checker=_lax(Draft202012Validator.TYPE_CHECKER))
                if base == DOCUMENT
                else Draft202012Validator
            )
            self.validators[text] = kind(absolute, registry=self.registry)
        validator = self.validators[text]
        if not validator.is_valid(value):
            error = best_match(validator.iter_errors(value))
            shown = "/".join(str(part) for part in error.absolute_path)
            raise AssertionError(f"{where}: {shown or 'the body'}: {error.message[:1500]}")


def _lax(checker: Any) -> Any:
    """Bodies are read as pydantic reads them: `"3"` and `true` are taken for numbers, and 1 for true."""

    def number(_: Any, value: Any) -> bool:
        return isinstance(value, int | float) or (
            isinstance(value, str) and bool(re.fullmatch(r"\s*[+-]?[\d_]*\.?\d+([eE][+-]?\d+)?\s*", value))
        )

    return checker.redefine_many(
        {"integer": number, "number": number, "boolean": lambda _, value: isinstance(value, bool | int | float | str)}
    )


def _values(answer: Answer) -> list[Any]:
    """The JSON of a body, or of each event of a stream."""
    if answer.kind == "application/json":
        return [json.loads(answer.body)]
    if answer.kind == "text/event-stream":
        said = [line[5:].strip() for line in answer.body.decode().splitlines() if line.startswith("data:")]
        return [json.loads(text) for text in said if text != "[DONE]"]
    return []


def _without_old_name(value: Any) -> Any:
    """The first stored error in an answer that does not also send its hint as `way_out`; None where all do."""
    if isinstance(value, dict):
        problem = value.get("error")
        if isinstance(problem, dict) and "hint" in problem and problem.get("way_out", ...) != problem["hint"]:
            return problem
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((found for one in inside if (found := _without_old_name(one)) is not None), None)


def _absolute(value: Any, base: str) -> Any:
    if isinstance(value, dict):
        return {k: f"{base}{v}" if k == "$ref" and isinstance(v, str) else _absolute(v, base) for k, v in value.items()}
    return [_absolute(item, base) for item in value] if isinstance(value, list) else value


def _closed(value: Any) -> Any:
    """A copy in which no object has more than what is described."""
    if isinstance(value, dict):
        closed = {name: _closed(item) for name, item in value.items()}
        if isinstance(value.get("properties"), dict) and value.get("type") == "object":
            closed.setdefault("additionalProperties", False)
        return closed
    return [_closed(item) for item in value] if isinstance(value, list) else value
