"""Chat-template markers in a text, which a model would be trained to write."""

from __future__ import annotations

from app.datasets.edits import markers
from app.datasets.rules._base import Rule, Seen
from app.formats import RowFinding
from app.formats._base import around, fix


class TemplateMarkers(Rule):
    def see(self, seen: Seen) -> None:
        for column, part in seen.texts:
            if found := next(markers(part), None):
                message = (
                    f"The text holds “{found.group()}”, which chat templates use to mark turns; the model would be trained to write it."
                )
                value = around(part, found)
                self.say(seen.line, RowFinding("template_marker", message, column, value, "warning", fix("Remove it", "strip_markers")))
