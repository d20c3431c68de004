"""Ratings that are all the same."""

from __future__ import annotations

from collections.abc import Mapping

from app.datasets.rules._base import Rule, Say, Seen
from app.formats import Format, RowFinding


class Ratings(Rule):
    def __init__(self, say: Say, entry: Format, mapping: Mapping[str, str]) -> None:
        super().__init__(say, entry, mapping)
        self._given: set[str] = set()

    def see(self, seen: Seen) -> None:
        if not self.classifies and len(self._given) < 2 and (label := seen.shape.label(seen.row)) is not None:
            self._given.add(label)

    def finish(self) -> None:
        if len(self._given) == 1:
            (only,) = self._given
            message = f"Every answer is rated {only}; training needs both kinds."
            self.say(None, RowFinding("one_class", message, self.mapping.get("label"), only, "warning"))
