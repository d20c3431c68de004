"""Every answer under /v1 that a test gets is checked against the API's document: its status, its type, and each field of its body.
So is every JSON body that was accepted.

`install` puts the check into Starlette's test client, so the whole test suite drives it. Objects are closed for the check: a field
that is sent and not described fails, as does one that is described and not sent.
"""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from typing import Any

DOCUMENT = "urn:openapi"
checked: Counter[str] = Counter()
"""Answers that were checked, by operation and status."""


def install() -> None:
    """From now on every `TestClient` of this process checks what it gets."""
    from starlette.testclient import TestClient

    if getattr(TestClient.send, "checks", False):
        return
    send = TestClient.send

    def checking(self: Any, request: Any, **options: Any) -> Any:
        response = send(self, request, **options)
        if request.url.path.startswith("/v1/"):
            response.read()
            contract().check(request.method, request.url.path, response)
            if response.is_success and request.headers.get("content-type") == "application/json":
                contract().check_request(request.method, request.url.path, json.loads(request.read()))
        return response

    checking.checks = True  # type: ignore[attr-defined]
    TestClient.send = checking  # type: ignore[method-assign]


@cache
def contract() -> Contract:
    from app.main import create_app

    return Contract(create_app())


class Contract:
    """The document of an application, and the check of an answer against it."""

    def __init__(self, app: Any) -> None:
        from referencing import Registry, Resource
        from referencing.jsonschema import DRAFT202012

        from app.openapi import document, operations

        self.document = document(app)
        self.routes = [(method, route.path_regex, path) for method, path, route in operations(app)]
        closed = Resource.from_contents(_closed(self.document), default_specification=DRAFT202012)
        self.registry: Any = Registry().with_resource(DOCUMENT, closed)
        self.validators: dict[str, Any] = {}

    def operation(self, method: str, path: str) -> dict[str, Any] | None:
        """What answers a request; None where nothing is documented."""
        for known, pattern, name in self.routes:
            if known == method.lower() and pattern.match(path):
                found: dict[str, Any] = self.document["paths"][name][known]
                return found
        return None

    def check(self, method: str, path: str, response: Any) -> None:
        """Raises AssertionError for an answer that is not as the document says."""
        operation = self.operation("GET" if method == "HEAD" and self.operation(method, path) is None else method, path)
        if operation is None or response.status_code == 405:
            return  # an address or method that is not there, or one that the test itself has put there
        where = f"{method} {path} answered {response.status_code}"
        name = operation["operationId"]
        said = operation["responses"].get(str(response.status_code))
        assert said is not None, f"{where}, which {name} does not document: {response.text[:500]}"
        if "$ref" in said:
            said = self.document["components"]["responses"][said["$ref"].rsplit("/", 1)[-1]]
        checked[f"{name} {response.status_code}"] += 1
        if method == "HEAD" or not response.content:
            assert method == "HEAD" or not said.get("content"), f"{where} without a body"
            return
        kind = response.headers.get("content-type", "").partition(";")[0]
        content = said.get("content", {"text/plain": {}}).get(kind)
        assert content is not None, f"{where} with {kind or 'no type'}, which {name} does not document"
        for value in _values(kind, response):
            self._validate(content["schema"], value, f"{where} ({name})")

    def check_request(self, method: str, path: str, body: Any) -> None:
        """Raises AssertionError for a body that was accepted although the document knows no such body. Null is as good as absent."""
        operation = self.operation(method, path)
        if operation is None or not body:
            return
        where = f"{method} {path} ({operation['operationId']}) took a body"
        assert "requestBody" in operation, where
        given = {name: value for name, value in body.items() if value is not None}
        self._validate(operation["requestBody"]["content"]["application/json"]["schema"], given, f"{where}, wrong by the document")

    def _validate(self, schema: dict[str, Any], value: Any, where: str) -> None:
        from jsonschema import Draft202012Validator
        from jsonschema.exceptions import best_match

        text = json.dumps(schema)
        if text not in self.validators:
            self.validators[text] = Draft202012Validator(_absolute(schema), registry=self.registry)
        validator = self.validators[text]
        if not validator.is_valid(value):
            error = best_match(validator.iter_errors(value))
            shown = "/".join(str(part) for part in error.absolute_path)
            raise AssertionError(f"{where}: {shown or 'the body'}: {error.message[:1500]}")


def _values(kind: str, response: Any) -> list[Any]:
    """The JSON of a body, or of each event of a stream."""
    if kind == "application/json":
        return [json.loads(response.content)]
    if kind == "text/event-stream":
        said = [line[5:].strip() for line in response.text.splitlines() if line.startswith("data:")]
        return [json.loads(text) for text in said if text != "[DONE]"]
    return []


def _absolute(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: f"{DOCUMENT}{v}" if k == "$ref" and isinstance(v, str) else _absolute(v) for k, v in value.items()}
    return [_absolute(item) for item in value] if isinstance(value, list) else value


def _closed(value: Any) -> Any:
    """A copy in which no object has more than what is described."""
    if isinstance(value, dict):
        closed = {name: _closed(item) for name, item in value.items()}
        if isinstance(value.get("properties"), dict) and value.get("type") == "object":
            closed.setdefault("additionalProperties", False)
        return closed
    return [_closed(item) for item in value] if isinstance(value, list) else value
