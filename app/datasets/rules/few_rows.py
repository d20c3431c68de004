"""A dataset that is too small to train on. Labeled rows are counted by class: the smallest one decides."""

from __future__ import annotations

from collections.abc import Mapping

from app.datasets.rules._base import Rule, Say, Seen
from app.formats import Format, RowFinding

MIN_ROWS = 10


class FewRows(Rule):
    def __init__(self, say: Say, entry: Format, mapping: Mapping[str, str]) -> None:
        super().__init__(say, entry, mapping)
        self._rows = 0

    def see(self, seen: Seen) -> None:
        self._rows += 1

    def finish(self) -> None:
        if not self.classifies and self._rows < MIN_ROWS:
            rows = f"{self._rows} valid row{'s' if self._rows != 1 else ''}"
            message = f"Only {rows}: enough to try things out, too few to train on. A few dozen valid rows already show an effect."
            self.say(None, RowFinding("few_rows", message, severity="warning"))
