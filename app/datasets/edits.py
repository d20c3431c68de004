"""Edits: what a version changes in the rows of its file. They are applied while the file is parsed again.

A version keeps the whole list, from its file on, so a line keeps its number through every version and nothing is ever changed in
place. One edit is {"operation", "lines": […], …}:

    drop_row        the row is removed
    repair          an unparsable line is read as it was probably meant (`app/datasets/readers/_repair.py`); with `all`, every one
    mend            the row's own fix for `rule` is applied until the rule finds nothing
    replace         the row is `row`, a normalized row as a person typed it
    retype          the line of the file is `row`, in the file's own columns, as a person typed it
    relabel         the label is `label`; with `all`, of every row whose label is one of `from`
    strip_control   control characters are removed   strip_markers   chat-template markers are removed
    roles           messages of some speakers, in every row, get other roles: `roles` maps names to roles
    mask            what looks like a secret or personal data becomes a placeholder
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from app import formats
from app.formats import Format, RowFinding
from app.formats._base import Row, parsed
from app.formats._messages import recast
from app.formats.classification import label_of

CONTROL = re.compile("\x1b\\[[0-9;?]{0,20}[A-Za-z]|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202d\u202e\ufeff\ufffe\uffff]")
"""Terminal color codes; characters that are invisible, change the direction of writing, or are left over from another encoding."""
_MARKER = re.compile(
    r"(?s:(?<=.))<s>[^<\[\n]{1,500}</s>"  # text struck out in HTML
    r"|(?P<marker><[|｜][\w▁]{2,40}[|｜]>|\[/?INST\]|\[/?(?:TOOL_CALLS|AVAILABLE_TOOLS|TOOL_RESULTS|SYSTEM_PROMPT)\]|<</?SYS>>"
    r"|<(?:start|end)_of_turn>|<[be]os>|\A<s>|</s>)"
)

MAX_MENDS = 200
"""Maximum fixes of one row for one rule: a conversation of 200 wrong turns cannot be fixed."""

Edit = dict[str, Any]


def markers(text: str) -> Iterator[re.Match[str]]:
    """Every marker in a text that ends or begins turns in some model's chat template."""
    return (found for found in _MARKER.finditer(text) if found["marker"]) if "<" in text or "[" in text else iter(())


class Edits:
    """The edits of a version, applied to its rows in the order they were made."""

    def __init__(self, edits: Iterable[Edit]) -> None:
        self._by_line: dict[int, list[tuple[int, Edit]]] = {}
        self._everywhere: list[tuple[int, Edit]] = []
        self._repairs_all = False
        self._roles: dict[str, str] = {}
        for place, edit in enumerate(edits):
            self._roles |= edit.get("roles", {})
            if edit.get("all") and edit["operation"] == "repair":
                self._repairs_all = True
            elif edit.get("all"):
                self._everywhere.append((place, edit))
            for line in edit["lines"]:
                self._by_line.setdefault(line, []).append((place, edit))

    def at(self, line: int) -> list[Edit]:
        """The edits of a line."""
        own = self._by_line.get(line, [])
        return [edit for _, edit in (sorted([*own, *self._everywhere], key=lambda one: one[0]) if self._everywhere else own)]

    def repairs(self, line: int) -> bool:
        """Whether an unparsable line is to be read as it was probably meant."""
        return self._repairs_all or any(edit["operation"] == "repair" for edit in self.at(line))

    def touches(self, line: int) -> bool:
        """Whether a row may differ in this version from the file."""
        return bool(self._roles or self.at(line))

    def apply(self, line: int, row: Row, entry: Format, mapping: Mapping[str, str]) -> tuple[Row | None, Row | None]:
        """(raw row, normalized row): the first when it must still be checked, the second when a person typed it; neither when it
        is removed."""
        typed: Row | None = None
        row = recast(row, mapping.values(), self._roles)
        for edit in self.at(line):
            operation = edit["operation"]
            if operation == "drop_row":
                return None, None
            if operation == "replace":
                typed = edit["row"]
            elif operation == "retype":
                row, typed = edit["row"], None
            elif operation == "relabel":
                row, typed = _relabeled(row, edit, mapping.get("label")), typed and _relabeled(typed, edit, "label")
            elif operation in TEXT_EDITS:
                change = TEXT_EDITS[operation]
                row, typed = _in_texts(row, change), typed and _in_texts(typed, change)
            elif operation == "mend" and typed is None:
                mended = mend(row, edit["rule"], entry, mapping)
                if mended is None:
                    return None, None
                row = mended
        return (None, typed) if typed is not None else (row, None)


def _relabeled(row: Row, edit: Edit, column: str | None) -> Row:
    if column not in row or ("from" in edit and label_of(row, column) not in edit["from"]):
        return row
    return {**row, column: edit["label"]}


def mend(row: Row, rule: str, entry: Format, mapping: Mapping[str, str]) -> Row | None:
    """The row with its own fixes for `rule` applied until none is left; None when the fix is to remove it."""
    for _ in range(MAX_MENDS):
        found = next((f for f in entry.check(row, mapping) if f.rule == rule and f.fix), None)
        if found is None or found.fix is None:
            return row
        changed = _mended(row, found, mapping)
        if changed is None or changed == row:
            return row if rule == "wrong_role" else None  # no row is removed because of the name of a speaker
        row = changed
    return row


def _mended(row: Row, found: RowFinding, mapping: Mapping[str, str]) -> Row | None:
    assert found.fix is not None
    operation, arguments = found.fix["operation"], found.fix["arguments"]
    if operation == "role":
        return recast(row, mapping.values(), {arguments["name"]: arguments["role"]})
    if operation == "set" and found.column:
        return _with(row, found.column, lambda holder, key: _set(holder, key, arguments["value"]))
    column = re.split(r"[.\[]", found.column or "", maxsplit=1)[0]
    turns = parsed(row.get(column))
    if not isinstance(turns, list):
        return None
    return {**row, column: changed} if (changed := _turns(turns, operation, arguments)) else None


def _turns(turns: list[Any], operation: str, arguments: dict[str, Any]) -> list[Any] | None:
    """A conversation with one fix applied; None for an operation that removes the row."""
    index = arguments.get("index", 0)
    if operation == "system_first":
        first = [turn for turn in turns if _speaker(turn) in ("system", "developer")]
        return first + [turn for turn in turns if _speaker(turn) not in ("system", "developer")]
    if operation == "drop_message" and index < len(turns):
        return turns[:index] + turns[index + 1 :]
    if operation == "join_messages" and 0 < index < len(turns):
        key = "content" if "content" in turns[index] else "value"
        joined = {**turns[index - 1], key: f"{turns[index - 1].get(key) or ''}\n\n{turns[index].get(key) or ''}"}
        return [*turns[: index - 1], joined, *turns[index + 1 :]]
    return None


def _speaker(turn: Any) -> Any:
    return turn.get("role", turn.get("from")) if isinstance(turn, dict) else None


def _set(holder: Any, key: Any, value: Any) -> None:
    if value is None and isinstance(holder, dict):
        holder.pop(key, None)
    elif isinstance(holder, dict) and key == "role" and key not in holder:  # ShareGPT's key for the same thing
        holder["from" if "from" in holder else key] = value
    else:
        holder[key] = value


def _with(row: Row, path: str, change: Callable[[Any, Any], None]) -> Row | None:
    """A copy of the row with `change` made at a path like `messages[2].role`; None when the path does not exist."""
    steps: list[str | int] = [int(s[1:-1]) if s[0] == "[" else s for s in re.findall(r"\[\d+\]|[^.\[\]]+", path)]
    copy: Row = dict(row)
    holder: Any = copy
    try:
        for step in steps[:-1]:
            inner = parsed(holder[step])
            holder[step] = dict(inner) if isinstance(inner, dict) else list(inner)
            holder = holder[step]
        change(holder, steps[-1])
    except (KeyError, IndexError, TypeError):
        return None
    return copy


# Texts ----------------------------------------------------------------------------------------------------------------


def _in_texts(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_in_texts(item, change) for item in value]
    if isinstance(value, dict):
        return {key: item if key in ("role", "from", "label") else _in_texts(item, change) for key, item in value.items()}
    return value


def _mask(text: str) -> str:
    from app.datasets.rules.secrets import mask

    return mask(text)


TEXT_EDITS: dict[str, Callable[[str], str]] = {
    "strip_control": lambda text: CONTROL.sub("", text),
    "strip_markers": lambda text: _MARKER.sub(lambda found: "" if found["marker"] else found.group(), text),
    "mask": _mask,
}


# Rows as a person types them ------------------------------------------------------------------------------------------


def check_normalised(row: Any, shape: str) -> list[RowFinding]:
    """Findings about a normalized row of a shape, as a person typed it; an error means that it cannot be kept."""
    if not isinstance(row, dict):
        return [RowFinding("wrong_shape", "A row must be an object.")]
    owner = formats.get(shape)
    entry = formats.get(owner.checked_as or owner.name)
    mapping = entry.identity(row)
    missing = [field.name for field in entry.fields if field.required and field.name not in mapping]
    if missing:
        return [RowFinding("missing_field", f"The row has no “{missing[0]}”.", missing[0])]
    return entry.check(row, mapping)
