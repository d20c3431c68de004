"""Simulated tools: what answers a model's calls where no real tool may run. A table of the row, or a function of one's own in the sandbox
of Python graders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from app.errors import BadField, Unavailable
from app.graders import _sandbox
from app.graders._base import JSON, GradeError
from app.graders.python import HINT, MAX_SOURCE
from app.graders.tool_call import same
from app.languages import gettext

COLUMN = "tool_results"
"""The column of a row with the table: a list of {"name", "arguments", "result"}."""
MAX_RESULT = 16 << 10
"""Characters of a result; the rest is cut."""


class SimulatedTools:
    """Answers calls by `call(name, arguments, item)` of a Python `source`, or without one by the table of the row."""

    def __init__(self, source: str = "") -> None:
        self.source = source

    def prove(self, param: str) -> None:
        """Run the source without calling it. Raises BadField and Unavailable."""
        if not self.source:
            return
        if len(self.source) > MAX_SOURCE:
            said = gettext("The code has more than %(most)s KiB.", most=MAX_SOURCE >> 10)
            raise BadField(said, hint=gettext("Shorten it."), param=param)
        try:
            with _sandbox.session() as running:
                _sandbox.feed(running, self.source)
                kind = str(_sandbox.feed(running, "str(type(call))"))
        except _sandbox.NoProcess as error:
            raise Unavailable(error.message, param=param) from None
        except GradeError as error:
            if "name 'call'" in error.message:
                said = gettext("The code defines no function call.")
                raise BadField(said, hint=gettext("Define call(name, arguments, item)."), param=param) from None
            said = gettext("The code does not run here: %(error)s", error=error.message)
            raise BadField(said, hint=gettext(HINT), param=param) from None
        if "function" not in kind:
            raise BadField(gettext("call is no function."), hint=gettext("Define call(name, arguments, item)."), param=param)

    def answers_for(self, item: Mapping[str, Any]) -> bool:
        """Whether a row's calls can be answered at all."""
        return bool(self.source) or _table(item) is not None

    def answer(self, name: str, arguments: str, item: JSON) -> str:
        """What a tool says to a call with these arguments, a JSON text. A call that cannot be answered is told so, as a real tool would: the model
        can learn from it. Raises NoProcess where the studio has no process for the code."""
        try:
            given = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            return _error("the arguments are not JSON")
        if self.source:
            try:
                return _text(_called(self.source, name, given, item))
            except _sandbox.NoProcess:
                raise
            except GradeError as error:
                return _error(error.message)
        for entry in _table(item) or ():
            if isinstance(entry, Mapping) and entry.get("name") == name and same(entry.get("arguments", {}), given):
                return _text(entry.get("result"))
        return _error(f"{name} has no result for these arguments")


def _table(item: Mapping[str, Any]) -> list[Any] | None:
    found = item.get(COLUMN)
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except (ValueError, RecursionError):
            return None
    return found if isinstance(found, list) else None


def _called(source: str, name: str, arguments: Any, item: JSON) -> Any:
    with _sandbox.session() as running:
        _sandbox.feed(running, source)
        return _sandbox.feed(running, "call(name, arguments, item)", {"name": name, "arguments": arguments, "item": item})


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text[:MAX_RESULT]


def _error(why: str) -> str:
    return json.dumps({"error": why[:500]}, ensure_ascii=False)
