"""RE2, as pyarrow has it: time linear in the text, and a limit to what an expression may grow to."""

from __future__ import annotations


def matches(pattern: str, text: str, *, ignore_case: bool = False) -> bool:
    """Whether the expression is found in the text. Raises ValueError for one that RE2 does not know."""
    import pyarrow as pa
    import pyarrow.compute as pc

    found = pc.match_substring_regex(pa.array([_storable(text)], pa.string()), pattern=_storable(pattern), ignore_case=ignore_case)
    return bool(found[0].as_py())


def fault_of(pattern: str) -> str:
    """Why RE2 does not take an expression; empty where it does."""
    try:
        matches(pattern, "")
    except ValueError as error:
        return str(error).removeprefix("Invalid regular expression: ").rstrip(".")[:200]
    return ""


def _storable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()  # a lone surrogate has no UTF-8
