"""The grammar of arguments that are written as elements, `<parameter=key>` and a value, as Qwen 3 Coder and Qwen 3.5 write them.

A string is any text up to the end of its element; one of several given strings is one of those; any other value is JSON of its schema.
What cannot be said so, as the pattern of a string, is refused.
"""

from __future__ import annotations

import json
from typing import Any

from app.answer_syntax._base import is_text
from app.errors import BadRequest

_CLOSES = "\n</parameter>\n"
_BOUNDS = ("pattern", "format", "minLength", "maxLength")


def rules(name: str, schema: dict[str, Any], function: str, spaces: str) -> dict[str, str]:
    """Rules of Lark, the first of them `name`, for the arguments of a schema. Raises BadRequest."""
    properties = schema.get("properties")
    if properties is None:
        value = f"{name}_value"
        return {name: f'("<parameter=" /[a-zA-Z_][a-zA-Z0-9_]*/ ">\\n" {value})*', f"{value}[lazy]": f"TEXT {json.dumps(_CLOSES)}"}
    found: dict[str, str] = {name: ""}
    parts = []
    for place, (key, one) in enumerate(properties.items()):
        value = f"{name}_{place}"
        part = f"{json.dumps(f'<parameter={key}>' + chr(10))} {value}"
        parts.append(part if key in schema.get("required", ()) else f"({part})?")
        found |= _value(value, one if isinstance(one, dict) else {}, schema, f"{function}.{key}", spaces)
    return found | {name: " ".join(parts) or '""'}


def _value(name: str, schema: dict[str, Any], whole: dict[str, Any], where: str, spaces: str) -> dict[str, str]:
    """A rule for one value and the end of its element."""
    end = json.dumps(_CLOSES)
    given = schema.get("enum") or ([schema["const"]] if "const" in schema else [])
    if given and all(isinstance(one, str) for one in given):
        return {name: f"({' | '.join(map(json.dumps, given))}) {end}"}
    if not is_text(schema):
        defined: dict[str, Any] = {key: whole[key] for key in ("$defs", "definitions") if key in whole}
        return {name: f"{name}_json {end}", f"{name}_json": json_rule({**defined, **schema}, spaces)}
    if bound := next((key for key in _BOUNDS if key in schema), None):
        raise BadRequest(
            f"{bound} of {where} cannot be followed by this model, which writes strings as they are.",
            hint="Remove it, or send tool_choice auto without strict.",
            param="tools",
        )
    return {f"{name}[lazy]": f"TEXT {end}"}


def json_rule(schema: dict[str, Any], spaces: str) -> str:
    """JSON of a schema, with no white space but this between its parts."""
    return f"%json {json.dumps(schema | {'x-guidance': {'whitespace_pattern': spaces}})}"
