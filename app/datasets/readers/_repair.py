"""Repairs of broken lines: offered as a fix, and applied only when a person asks for it."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from app.formats._base import Row, RowFinding, fix
from app.kit.json_safe import finite, storable, too_deep

LABELS = {
    "duplicate_key": "Keep the last of them",
    "not_a_number": "Replace with null",
    "lone_surrogate": "Put � there",
    "invalid_json": "Repair the line",
    "not_utf8": "Read the line as Windows-1252",
}
LONGEST, DEEPEST = 1 << 20, 60
_SURROGATES = re.compile("[\ud800-\udfff]")
_COMMA = re.compile(r",(\s*[}\]])")
_lenient = json.JSONDecoder(strict=False, parse_constant=lambda name: None, parse_float=finite)


def offer(problem: RowFinding, row: Row | None) -> RowFinding:
    """The finding with a fix, where there is a row that the line can become."""
    if row is None or problem.rule not in LABELS:
        return problem
    return problem._replace(fix=fix(LABELS[problem.rule], "repair"))


def windows_text(line: bytes) -> str | None:
    """The line decoded as Windows-1252; None where that is impossible."""
    try:
        return line.decode("cp1252")
    except UnicodeDecodeError:
        return None


def repaired(text: str) -> Row | None:
    """A row from almost-JSON: the last of two equal keys, null for NaN, a replacement character for a lone surrogate, without a
    trailing comma; or a printed Python dict. None where nothing sensible results."""
    if len(text) > LONGEST:
        return None
    for attempt in (_json, _without_commas, _python):
        try:
            value = attempt(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
        if isinstance(value, dict) and value and all(isinstance(key, str) for key in value) and not too_deep(value):
            mended: dict[str, Any] = storable(_whole(value))
            return mended
    return None


def _json(text: str) -> Any:
    return _lenient.decode(text)


def _without_commas(text: str) -> Any:
    return _lenient.decode(_COMMA.sub(r"\1", text))


def _python(text: str) -> Any:
    if max(text.count(mark) for mark in "[{(") > DEEPEST:  # Python's own parser is not made for hostile depth
        raise ValueError
    return ast.literal_eval(text.strip())


def _whole(value: Any) -> Any:
    """The value without lone surrogates and without what JSON cannot express."""
    if isinstance(value, str):
        return _SURROGATES.sub("\ufffd", value)
    if isinstance(value, dict):
        return {_whole(str(key)): _whole(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_whole(item) for item in value]
    return value if value is None or isinstance(value, int | float) else str(value)
