"""Control characters in a text: terminal color codes, and remains of another encoding."""

from __future__ import annotations

from app.datasets.edits import CONTROL
from app.datasets.rules._base import Rule, Seen
from app.formats import RowFinding
from app.formats._base import around, fix


class ControlCharacters(Rule):
    def see(self, seen: Seen) -> None:
        for column, part in seen.texts:
            if found := CONTROL.search(part):
                message = f"The text holds the control character {found.group()!r}."
                value = around(part, found)
                self.say(seen.line, RowFinding("control_character", message, column, value, "warning", fix("Remove it", "strip_control")))
