"""JSON Schema, checked in bounded time: the keywords of structured outputs, and no others.

`pattern` is RE2's, `$ref` leads into the schema itself alone, and a budget of steps ends what combinations of references would repeat.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from app.graders._re2 import fault_of, matches
from app.graders.tool_call import same
from app.languages import gettext

MAX_STEPS = 100_000
MAX_DEPTH = 60
MAX_BYTES = 64 << 10

TYPES: dict[str, Callable[[Any], bool]] = {
    "null": lambda v: v is None,
    "boolean": lambda v: isinstance(v, bool),
    "integer": lambda v: not isinstance(v, bool) and (isinstance(v, int) or (isinstance(v, float) and v.is_integer())),
    "number": lambda v: not isinstance(v, bool) and isinstance(v, int | float),
    "string": lambda v: isinstance(v, str),
    "array": lambda v: isinstance(v, list),
    "object": lambda v: isinstance(v, dict),
}
SILENT = ("$schema", "$id", "$defs", "definitions", "title", "description", "default", "examples", "$comment", "deprecated")
"""Keywords that demand nothing of a value."""


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_COUNTS: dict[str, tuple[type | tuple[type, ...], Callable[[Any, Any], bool]]] = {
    "minLength": (str, lambda v, n: len(v) >= n),
    "maxLength": (str, lambda v, n: len(v) <= n),
    "minItems": (list, lambda v, n: len(v) >= n),
    "maxItems": (list, lambda v, n: len(v) <= n),
    "minProperties": (dict, lambda v, n: len(v) >= n),
    "maxProperties": (dict, lambda v, n: len(v) <= n),
    "minimum": ((int, float), lambda v, n: v >= n),
    "maximum": ((int, float), lambda v, n: v <= n),
    "exclusiveMinimum": ((int, float), lambda v, n: v > n),
    "exclusiveMaximum": ((int, float), lambda v, n: v < n),
    "multipleOf": ((int, float), lambda v, n: _multiple(v, n)),
}
_SUBSCHEMAS = ("properties", "$defs", "definitions")
_LISTS = ("anyOf", "allOf", "oneOf")
KEYWORDS = (
    *SILENT, *_COUNTS, *_LISTS, "type", "properties", "required", "additionalProperties", "items", "enum", "const", "pattern", "not", "$ref",
)  # fmt: skip


def _multiple(value: float, step: float) -> bool:
    try:
        share = value / step
    except (OverflowError, ZeroDivisionError):
        return False
    return math.isfinite(share) and math.isclose(share, round(share), rel_tol=0, abs_tol=1e-9)


def fault_in(schema: Any, where: str = "schema", root: Any = None, depth: int = 0) -> str:
    """Why a schema cannot be checked; empty where it can."""
    root = schema if root is None else root
    if isinstance(schema, bool):
        return ""
    if not isinstance(schema, dict) or depth > MAX_DEPTH:
        return (
            gettext("%(field)s is no schema", field=where) if depth <= MAX_DEPTH else gettext("%(field)s is nested too deeply", field=where)
        )
    for key, value in schema.items():
        here = f"{where}.{key}"
        if key not in KEYWORDS:
            known = ", ".join(k for k in KEYWORDS if k not in SILENT)
            return gettext("%(field)s is not supported; there is %(keywords)s", field=here, keywords=known)
        if fault := _fault_of(key, value, here) or _fault_within(key, value, here, root, depth):
            return fault
    return ""


def _fault_of(key: str, value: Any, here: str) -> str:
    names = value if isinstance(value, list) else [value]
    if key == "type" and not (names and all(isinstance(name, str) and name in TYPES for name in names)):
        return gettext("%(field)s must be one of %(types)s", field=here, types=", ".join(TYPES))
    if key in _COUNTS and not (_number(value) and math.isfinite(value) and (key != "multipleOf" or value > 0)):
        return gettext("%(field)s must be a number", field=here)
    if key == "required" and not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
        return gettext("%(field)s must be a list of names", field=here)
    if key == "enum" and not isinstance(value, list):
        return gettext("%(field)s must be a list", field=here)
    if key == "pattern":
        reason = fault_of(value) if isinstance(value, str) else gettext("it is no text")
        return f"{here}: {reason}" if reason else ""
    return ""


def _fault_within(key: str, value: Any, here: str, root: Any, depth: int) -> str:
    if key == "$ref":
        return (
            ""
            if isinstance(value, str) and target(root, value) is not None
            else gettext("%(field)s must lead to a part of this schema, as #/$defs/NAME", field=here)
        )
    parts: Mapping[Any, Any] = {}
    if key in _SUBSCHEMAS or key in _LISTS:
        if not isinstance(value, dict if key in _SUBSCHEMAS else list):
            if key in _SUBSCHEMAS:
                return gettext("%(field)s must be an object of schemas", field=here)
            return gettext("%(field)s must be a list of schemas", field=here)
        parts = value if isinstance(value, dict) else dict(enumerate(value))
    elif key in ("items", "additionalProperties", "not"):
        return fault_in(value, here, root, depth + 1)
    return next((fault for name, one in parts.items() if (fault := fault_in(one, f"{here}.{name}", root, depth + 1))), "")


def target(root: Any, ref: str) -> Any:
    """The part of a schema that `#/$defs/NAME` leads to; None where there is none."""
    if ref == "#":
        return root
    if not ref.startswith("#/"):
        return None
    found = root
    for part in ref[2:].split("/"):
        name = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(found, dict) or name not in found:
            return None
        found = found[name]
    return found if isinstance(found, dict | bool) else None


class OutOfSteps(Exception):
    """The budget of steps is spent."""


class SchemaCheck:
    """One check of a value against a schema that `fault_in` has found nothing wrong with."""

    def __init__(self, schema: Any) -> None:
        self.root, self.steps = schema, 0

    def fits(self, value: Any, schema: Any = None, depth: int = 0) -> bool:
        """Whether the value is valid. Raises TooLong."""
        schema = self.root if schema is None else schema
        self.steps += 1
        if self.steps > MAX_STEPS or depth > 2 * MAX_DEPTH:
            raise OutOfSteps
        if isinstance(schema, bool):
            return schema
        return all(self._holds(key, rule, value, schema, depth + 1) for key, rule in schema.items() if key not in SILENT)

    def _holds(self, key: str, rule: Any, value: Any, schema: Mapping[str, Any], depth: int) -> bool:
        if key in _COUNTS:
            kinds, holds = _COUNTS[key]
            return isinstance(value, bool) or not isinstance(value, kinds) or holds(value, rule)
        match key:
            case "type":
                return any(TYPES[name](value) for name in (rule if isinstance(rule, list) else [rule]))
            case "enum" | "const":
                return any(same(value, one) for one in (rule if key == "enum" else [rule]))
            case "pattern":
                return not isinstance(value, str) or matches(rule, value)
            case "$ref":
                return self.fits(value, target(self.root, rule), depth)
            case "not":
                return not self.fits(value, rule, depth)
            case "anyOf" | "allOf":
                return (any if key == "anyOf" else all)(self.fits(value, one, depth) for one in rule)
            case "oneOf":
                return sum(self.fits(value, one, depth) for one in rule) == 1
            case "items":
                return not isinstance(value, list) or all(self.fits(one, rule, depth) for one in value)
        if not isinstance(value, dict):
            return True
        if key == "required":
            return all(name in value for name in rule)
        if key == "properties":
            return all(self.fits(value[name], one, depth) for name, one in rule.items() if name in value)
        return all(self.fits(one, rule, depth) for name, one in value.items() if name not in schema.get("properties", {}))
