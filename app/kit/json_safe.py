"""Makes values from untrusted files safe for Postgres and for pages: JSONB accepts no NUL, no lone surrogate and no infinite or
NaN number, and a page should not show a megabyte."""

from __future__ import annotations

import json
import math
from typing import Any

DEEPEST = 100
"""Maximum nesting of lists and objects in one row, because later readers recurse into them."""
_CUTS = ((4000, 100), (1000, 60), (300, 40), (100, 20), (60, 8))
"""(characters of a text, members of a list or object), from generous to strict."""


def to_json(value: Any) -> str:
    """JSON for a JSONB column. Nearly every value is clean, so only one that looks suspicious is walked through."""
    try:
        text = json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(storable(value))
    return json.dumps(storable(value)) if "\\u0000" in text or "\\ud" in text else text


def storable(value: Any, *, words: bool = False) -> Any:
    """The value as JSONB can keep it, keys too: � for NUL and for a lone surrogate, and null for NaN and infinities, or with `words`
    their names, which pydantic reads back as floats."""
    if isinstance(value, str):
        return value.replace("\0", "\ufffd").encode("utf-8", "replace").decode() if not value.isascii() or "\0" in value else value
    if isinstance(value, dict):
        return {storable(key) if isinstance(key, str) else key: storable(item, words=words) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [storable(item, words=words) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return ("NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity") if words else None
    return value


def finite(digits: str) -> float | None:
    """The float that JSON digits stand for; None where it overflows."""
    number = float(digits)
    return number if math.isfinite(number) else None


def shortened(value: Any, most_bytes: int) -> tuple[Any, bool]:
    """A row to show, in about `most_bytes` bytes of JSON at most, and whether it was shortened."""
    whole = storable(value)
    if len(json.dumps(whole, ensure_ascii=False)) <= most_bytes:
        return whole, False
    for characters, members in _CUTS:
        short = _short(whole, characters, members)
        if len(json.dumps(short, ensure_ascii=False)) <= most_bytes:
            break
    return short, True


def _short(value: Any, characters: int, members: int) -> Any:
    if isinstance(value, str):
        return value if len(value) <= characters else value[:characters] + "…"
    if isinstance(value, list):
        return [_short(item, characters, members) for item in value[:members]]
    if isinstance(value, dict):
        return {_short(key, 100, members): _short(item, characters, members) for key, item in list(value.items())[:members]}
    return value


def too_deep(value: Any, deepest: int = DEEPEST) -> bool:
    """Whether lists and objects are nested deeper than `deepest`; determined without recursion."""
    level = [value]
    for _ in range(deepest + 1):
        level = [item for one in level if isinstance(one, dict | list) for item in (one.values() if isinstance(one, dict) else one)]
        if not level:
            return False
    return any(isinstance(one, dict | list) for one in level)
