"""Label sets: a single label, spelling variants, labels with a single row, numbers among words."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Mapping

from app.datasets.rules._base import Rule, Say, Seen
from app.formats import Format, RowFinding
from app.formats._base import fix, shown

MAX_COUNTED = 20_000
MAX_COMPARED = 500
"""Labels among which similar ones are searched: it compares all pairs."""
NEAR = 0.75


class Labels(Rule):
    def __init__(self, say: Say, entry: Format, mapping: Mapping[str, str]) -> None:
        super().__init__(say, entry, mapping)
        self._counts: dict[str, int] = {}
        self._first: dict[str, int] = {}

    def see(self, seen: Seen) -> None:
        if not self.classifies:
            return
        label = seen.row["label"]
        if label in self._counts or len(self._counts) < MAX_COUNTED:
            self._counts[label] = self._counts.get(label, 0) + 1
            self._first.setdefault(label, seen.line)

    def finish(self) -> None:
        if not self._counts:
            return
        if len(self._counts) == 1:
            (only,) = self._counts
            message = f"Every row has the label “{shown(only, 60)}”. A classifier needs at least two."
            self.say(None, RowFinding("one_class", message, None, shown(only), "warning"))
            return
        spelled = self._variants()
        often = [label for label, count in self._counts.items() if count > 1]
        for label, count in self._counts.items():
            if count == 1 and label not in spelled:
                self._rare(label, often)
        numbers = [label for label in self._counts if re.fullmatch(r"-?\d+(\.\d+)?", label)]
        if 0 < len(numbers) < len(self._counts):
            self._warn(numbers[0], "mixed_labels", "Some labels are numbers and some are words.")

    def _variants(self) -> set[str]:
        """Report labels that differ in case, spacing or punctuation only; returns the rarer spellings."""
        alike: dict[str, list[str]] = defaultdict(list)
        for label in self._counts:
            alike[re.sub(r"[\W_]+", " ", label.casefold()).strip() or label].append(label)
        rarer = set[str]()
        for labels in alike.values():
            if len(labels) < 2:
                continue
            best, *others = sorted(labels, key=lambda label: (-self._counts[label], self._first[label]))
            rarer.update(others)
            listed = ", ".join(f"“{shown(label, 60)}” ({self._rows(label)})" for label in [*others, best][-6:])
            message = f"Labels that differ in spelling only: {listed}. A classifier takes them for different classes."
            self._warn(others[0], "label_variants", message, _merge(f"Merge into “{shown(best, 60)}”", others, best))
        return rarer

    def _rare(self, label: str, often: list[str]) -> None:
        near = difflib.get_close_matches(label, often, 1, NEAR) if len(self._counts) <= MAX_COMPARED and len(label) <= 60 else []
        meant = f" Did you mean “{near[0]}”?" if near else ""
        message = f"Only one row has the label “{shown(label, 60)}”, so it cannot be both trained and validated.{meant}"
        self._warn(label, "rare_label", message, _merge(f"Change to “{near[0]}”", [label], near[0]) if near else None)

    def _rows(self, label: str) -> str:
        return f"{self._counts[label]:,} row{'s' if self._counts[label] != 1 else ''}"

    def _warn(self, label: str, rule: str, message: str, repair: dict[str, object] | None = None) -> None:
        self.say(self._first[label], RowFinding(rule, message, None, shown(label), "warning", repair))


def _merge(title: str, labels: list[str], into: str) -> dict[str, object]:
    return fix(title, "merge_labels", **{"from": labels, "into": into})
