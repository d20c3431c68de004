"""The OpenAPI document of everything under /v1: parameters, request bodies, responses and errors of each operation.

    decorators of the routes ── answers(…), takes(…) ──→ document(app) ──→ /v1/openapi.json, docs/api.md

FastAPI derives parameters and typed bodies. Responses are described here and not by its `response_model`: validating and
serializing again what is built already takes 3 times as long for a page of 100 datasets and 14 times for one of 100 tokenized
rows, silently drops undescribed fields, and turns an object stored by an earlier version into a 500. Instead the tests check
every response against this document, with `additionalProperties` false (`tests/documented.py`), and that each operation was
checked (`tests/security/test_fuzz.py`).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from app.schemas.base import Error
from app.settings import get_settings
from app.web.auth import SAFE
from app.web.navigation import each_route

Json = dict[str, Any]
JSON = "application/json"
EVENTS = "text/event-stream"
BYTES: Json = {"type": "string", "format": "binary"}

REFUSALS: dict[int, str] = {
    400: "The request is wrong; `param` names the field.",
    401: "No API key was sent, or one that is not known or was revoked.",
    403: "The account's role or the key's scopes do not allow this; or the request came from a page of another site.",
    404: "There is no such object, or it belongs to another account.",
    409: "The object is in a state that forbids this.",
    410: "The upload was given up, or waited too long.",
    412: "The sender does not speak tus 1.0.0.",
    413: "The body is larger than this studio takes.",
    415: "The body is of another type than this address takes.",
    422: "The model's chat template had to be stopped for this conversation.",
    423: "Another request is sending bytes of the same upload.",
    429: "A limit is reached (`limit_reached`), too many requests of this account came in a minute or are being answered, or too many passwords are being tried.",
    500: "A fault of the studio. Its log has the request id.",
    503: "A part of the studio is away. Nothing is lost; ask again.",
    507: "A disk of the studio is full.",
}
"""Every error status and its description. All have the body `{"error": …}`."""
ALWAYS = (400, 401, 403, 429, 500, 503, 507)
UNSAFE = (413,)
RETRY = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
HEADERS: dict[int, Json] = {
    409: {"X-Should-Retry": {"description": "false: the client need not ask again.", "schema": {"type": "string"}}},
    429: RETRY | {"X-Should-Retry": {"description": "false where a limit is reached.", "schema": {"type": "string"}}},
    503: RETRY,
}

_described: dict[str, tuple[type[BaseModel], JsonSchemaMode]] = {}
"""Every model that a route uses, by its reference, until the document is built."""
_PLACE = "#/described/"


def schema(model: type[BaseModel], mode: JsonSchemaMode = "serialization") -> Json:
    """A reference to a model. `document` builds the schema, so that it does not slow down the start of the web process."""
    reference = f"{_PLACE}{mode}/{model.__module__}.{model.__qualname__}"
    _described[reference] = (model, mode)
    return {"$ref": reference}


def answers(
    model: type[BaseModel] | None,
    *refusals: int,
    status: int = 200,
    description: str = "",
    events: type[BaseModel] | None = None,
    headers: Json | None = None,
    media_type: str = JSON,
) -> dict[int | str, Json]:
    """The `responses` of a route: the success response, and errors in addition to those that `document` adds. `events` is the
    data of one server-sent event, where the response may be a stream; a route without `model` has no body."""
    content: Json = {}
    if model is not None:
        content[media_type] = {"schema": schema(model)}
    if events is not None:
        content[EVENTS] = {"schema": {"anyOf": [schema(events), schema(Error)]}}  # a stream that fails ends with an error event
    said: Json = {"description": description or (first_sentence(model.__doc__) if model else "") or "Done."}
    said |= {"content": content} if content else {}
    said |= {"headers": headers} if headers else {}
    return {status: said, **{refusal: {"description": REFUSALS[refusal]} for refusal in refusals}}


def takes(model: type[BaseModel], media_type: str = JSON) -> Json:
    """The `openapi_extra` of a route that parses its body itself."""
    return {"requestBody": {"required": True, "content": {media_type: {"schema": schema(model, "validation")}}}}


def header(name: str, description: str, kind: str = "string", *, required: bool = True) -> Json:
    """A header that a route reads itself, for `openapi_extra`'s `parameters`."""
    return {"name": name, "in": "header", "required": required, "description": description, "schema": {"type": kind}}


def first_sentence(text: str | None) -> str:
    """The first sentence of a docstring, on one line, with its full stop."""
    line = " ".join((text or "").split())
    return re.split(r"(?<=[.!?]) (?=[A-Z`])", line, maxsplit=1)[0]


# The document ---------------------------------------------------------------------------------------------------------


def document(app: FastAPI) -> Json:
    """The whole document, built once and cached by the application."""
    if app.openapi_schema is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a GET that also answers HEAD has one operation id for both
            found = get_openapi(title=app.title, version=app.version, summary=app.summary, description=ABOUT, routes=app.routes)
        for method, path, route in operations(app):
            if "GET" in route.methods:
                found["paths"][path].pop("head", None)
            _complete(found["paths"][path][method], method, path, route)
        found["servers"] = [{"url": get_settings().public_url or "/", "description": "This studio."}]
        found["security"] = [{"key": []}]
        found["tags"] = [{"name": name, "description": text} for name, text in TAGS.items()]
        found["components"] = _components(found.get("components", {}))
        app.openapi_schema = _resolved(found)
    return app.openapi_schema


def operations(app: FastAPI) -> Iterator[tuple[str, str, Any]]:
    """(method in lower case, path of the document, route) of everything under /v1; HEAD is omitted where there is a GET."""
    for path, route in each_route(app.router):
        if path.startswith("/v1/"):
            for method in sorted(route.methods - {"HEAD"} if "GET" in route.methods else route.methods):
                yield method.lower(), route.path_format, route


def _complete(operation: Json, method: str, path: str, route: Any) -> None:
    operation["tags"] = [getattr(route, "successor", path).split("/")[2].removesuffix(".json")]
    operation["summary"] = first_sentence(route.description).rstrip(".")
    declared = {int(status): said for status, said in route.responses.items()}
    good = {status: said for status, said in declared.items() if status < 400}
    refused = {*ALWAYS, *(status for status in declared if status >= 400)}
    refused |= set(UNSAFE) if method.upper() not in SAFE else set()
    named = "{" in path or any(parameter["name"] == "after" for parameter in operation.get("parameters", []))
    refused |= {404} if named else set()
    refusals = {status: {"$ref": f"#/components/responses/{status}"} if status in REFUSALS else declared[status] for status in refused}
    operation["responses"] = {str(status): said for status, said in sorted((good | refusals).items())}


def _components(found: Json) -> Json:
    given = {name: one for name, one in found.get("schemas", {}).items() if name not in ("HTTPValidationError", "ValidationError")}
    refusals = {
        str(status): {"description": text, "content": {JSON: {"schema": schema(Error)}}, "headers": HEADERS.get(status, {})}
        for status, text in REFUSALS.items()
    }
    key = {"type": "http", "scheme": "bearer", "description": "An API key from Settings, or from `luthier keys create`."}
    return found | {"schemas": given, "responses": refusals, "securitySchemes": {"key": key}}


def _resolved(found: Json) -> Json:
    """The document with every described model in its components, and references to them."""
    names, made = models_json_schema(list(_described.values()), ref_template="#/components/schemas/{model}")
    real = {reference: names[described]["$ref"] for reference, described in _described.items()}
    schemas = found["components"]["schemas"]
    for name, one in made.get("$defs", {}).items():
        if schemas.setdefault(name, one) != one:
            raise RuntimeError(f"Two different models are called {name} in the API's document.")
    found["components"]["schemas"] = dict(sorted(schemas.items()))

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: real.get(v, v) if k == "$ref" and isinstance(v, str) else walk(v) for k, v in value.items()}
        return [walk(item) for item in value] if isinstance(value, list) else value

    resolved: Json = walk(found)
    return resolved


ABOUT = """The API of this studio, in the shape of the OpenAI API: its clients work with `base_url` set to this address and `/v1`.

Every refusal is `{"error": {"message", "type", "param", "code"}}`. Lists come in pages: while `has_more` is true, ask again with
`after` set to `last_id`. Times are seconds since 1970. An object of another account is a 404."""

TAGS = {
    "advice": "Whether to fine-tune at all, and by which method.",
    "batches": "Requests of a file, answered in the background.",
    "chat": "Answers to conversations.",
    "classify": "Labels of texts.",
    "comparisons": "Several methods on the same data.",
    "completions": "Continuations of texts.",
    "datasets": "Datasets: their versions, reports, rows and splits.",
    "distillations": "Datasets of a teacher's best answers.",
    "embeddings": "Vectors of texts.",
    "engines": "Servers that answer for models.",
    "estimates": "What a job would take.",
    "evaluations": "Models scored on datasets.",
    "evals": "Criteria for answers, and runs of models over items, as OpenAI's evals.",
    "exports": "Models written in formats for other programs.",
    "predictions": "A model over all rows of a file, which comes back with columns added.",
    "files": "Uploaded files.",
    "graders": "What scores an answer, saved under a name.",
    "hub": "Models of the Hugging Face hub.",
    "fine_tuning": "Jobs, their events and checkpoints.",
    "model_aliases": "Names of your own for models, which can be moved from one to another, through a gate where they have one.",
    "models": "Base models and their fine-tunes, and which of them are loaded.",
    "next_tokens": "The next tokens a model predicts, and the likelihood of a text.",
    "openapi": "This document.",
    "organization": "The people of the studio, its projects and the audit log, for admins.",
    "prompts": "Prompts in versions, and their runs over the rows of a dataset.",
    "responses": "Answers to texts and items, which can be gone on from.",
    "searches": "The best settings by successive halving.",
    "strategies": "Fine-tuning methods.",
    "studio": "The health of the studio.",
    "tus": "Resumable uploads: tus 1.0.0.",
    "uploads": "Files in parts.",
    "webhook_endpoints": "Addresses that hear of the end of jobs and batches.",
    "webhook_event_types": "What they can hear of.",
    "votes": "Blind votes between two answers.",
}
"""One tag for each first path segment after /v1."""
