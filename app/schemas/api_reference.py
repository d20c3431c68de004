"""The OpenAPI document as Markdown: a table of the operations and one of the objects. `luthier openapi --markdown` prints it."""

from __future__ import annotations

import re
from typing import Any

from app.schemas.openapi import ABOUT, ALWAYS, REFUSALS, UNSAFE, first_sentence

Json = dict[str, Any]

HEAD = """# The API

Written by `luthier openapi --markdown > docs/api.md`. The whole of it, with every field: `GET /v1/openapi.json` of a running studio, or
`luthier openapi`; a client in any language is made from that.

{about}

Any operation may answer {always}; one that changes something also {unsafe}. What else an operation may refuse with is in its line.
"""


def markdown(document: Json) -> str:
    """The Markdown of a document of `app.schemas.openapi`. It is deterministic: it holds no address, version or date."""
    parts = [HEAD.format(about=ABOUT, always=_listed(ALWAYS), unsafe=_listed(UNSAFE))]
    parts += ["| refusal | means |", "|---|---|", *(f"| {status} | {_cell(text)} |" for status, text in REFUSALS.items()), ""]
    for tag in document["tags"]:
        rows = [
            _row(method, path, operation)
            for path, found in document["paths"].items()
            for method, operation in found.items()
            if tag["name"] in operation["tags"]
        ]
        parts += [
            f"## {tag['name']}",
            "",
            tag["description"],
            "",
            "| operation | | takes | answers | refuses |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    parts += ["## Objects", "", "A field with `?` may be absent.", "", "| object | | fields |", "|---|---|---|"]
    parts += [_object(name, schema) for name, schema in document["components"]["schemas"].items()]
    return "\n".join(parts) + "\n"


def _listed(statuses: tuple[int, ...]) -> str:
    *first, last = map(str, statuses)
    return f"{', '.join(first)} and {last}"


def _row(method: str, path: str, operation: Json) -> str:
    body = operation.get("requestBody", {}).get("content", {})
    takes = [_named(said["schema"]) + ("" if kind == "application/json" else f" ({kind})") for kind, said in body.items()]
    takes += [f"`{one['name']}`" for one in operation.get("parameters", []) if one["in"] == "query"]
    good = [said for status, said in operation["responses"].items() if status < "400"]
    answers = [
        ("events of " if kind == "text/event-stream" else "") + " or ".join(map(_named, said["schema"].get("anyOf", [said["schema"]])))
        for kind, said in next((said["content"] for said in good if "content" in said), {}).items()
    ]
    refuses = [status for status in operation["responses"] if status >= "400" and int(status) not in (*ALWAYS, *UNSAFE)]
    place = f"`{operation['operationId']}`<br>{method.upper()} `{path}`"
    return f"| {place} | {_cell(operation['summary'])} | {', '.join(takes)} | {' or '.join(answers) or 'headers'} | {', '.join(refuses)} |"


def _object(name: str, schema: Json) -> str:
    needed = schema.get("required", [])
    fields = [f"`{field}`" + ("" if field in needed else "?") for field in schema.get("properties", {})]
    one_of = " or ".join(map(_named, schema.get("oneOf", [])))
    return f'| <a id="{name.lower()}"></a>{name} | {_cell(first_sentence(schema.get("description")))} | {", ".join(fields) or one_of} |'


def _named(schema: Json) -> str:
    if "$ref" not in schema:
        return "bytes"
    name = schema["$ref"].rsplit("/", 1)[-1]
    return f"[{name}](#{name.lower()})"


def _cell(text: str) -> str:
    """A text escaped for a table cell."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|")
