"""One row as editable fields, and back again."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from app.errors import BadField
from app.languages import gettext

ROLES = ("system", "user", "assistant", "tool")


class RowText(NamedTuple):
    """One text of a row: where it stands, what it is called, and its role where it is a message."""

    path: str
    title: str
    text: str
    role: str | None = None


def parts(row: dict[str, Any]) -> list[RowText]:
    """The texts of a normalized row in reading order."""
    found: list[RowText] = []
    titles = {"text": gettext("Text"), "prompt": gettext("Prompt"), "completion": gettext("Completion"), "label": gettext("Label")}
    for key, title in titles.items():
        if isinstance(row.get(key), str):
            found.append(RowText(key, title, row[key]))
    for key in ("messages", "chosen", "rejected", "answer"):
        for place, message in enumerate(row.get(key) or ()):
            if isinstance(message, dict):
                found.append(RowText(f"{key}[{place}]", _title(key, place + 1), message.get("content") or "", message.get("role")))
    return found


def _title(key: str, number: int) -> str:
    return {
        "messages": gettext("Message %(number)s", number=number),
        "chosen": gettext("Chosen answer %(number)s", number=number),
        "rejected": gettext("Rejected answer %(number)s", number=number),
        "answer": gettext("Answer %(number)s", number=number),
    }[key]


def parsed(text: str) -> dict[str, Any] | None:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def merged(text: str, typed: dict[str, str]) -> str:
    """The row's JSON with the edited fields. Browsers send line ends as CR LF; rows have LF."""
    row = parsed(text)
    if row is None:
        raise BadField(gettext("The row is not valid JSON."), hint=gettext("Load the page again."), param="row")
    for name, value in typed.items():
        kind, _, path = name.partition(".")
        if kind not in ("text", "role") or not path:
            continue
        value = value.replace("\r\n", "\n")
        found = re.fullmatch(r"(\w+)(?:\[(\d+)\])?", path)
        try:
            if found is None:
                raise KeyError(path)
            if found[2] is None:
                row[found[1]] = value
            else:
                row[found[1]][int(found[2])]["content" if kind == "text" else "role"] = value
        except (KeyError, IndexError, TypeError, ValueError):
            said = gettext("The row has no “%(field)s”.", field=path[:60])
            raise BadField(said, hint=gettext("Load the page again."), param=name[:60]) from None
    return json.dumps(row, ensure_ascii=False)
