"""Duplicate rows: the same row again, or the same prompt with another answer, label or rating."""

from __future__ import annotations

import json
from collections.abc import Mapping

from app.datasets.issue_names import choice
from app.datasets.rules._base import Rule, Say, Seen
from app.formats import Format, RowFinding
from app.formats._base import fingerprint, fix, shown

MAX_REMEMBERED = 3_000_000
"""Maximum rows whose fingerprint is stored: about 300 MB."""


class Duplicates(Rule):
    def __init__(self, say: Say, entry: Format, mapping: Mapping[str, str]) -> None:
        super().__init__(say, entry, mapping)
        self._seen: dict[int, int] = {}
        self._asked: dict[int, tuple[int, int]] = {}

    def see(self, seen: Seen) -> None:
        if len(self._seen) >= MAX_REMEMBERED:
            return
        line, row = seen.line, seen.row
        content = {key: value for key, value in row.items() if key != "metadata"}
        whole = seen.json if seen.json is not None and "metadata" not in row else json.dumps(content, ensure_ascii=False)
        first = self._seen.setdefault(fingerprint(whole), line)
        if first != line:
            message = f"This row is the same as line {first}."
            self.say(line, RowFinding("duplicate", message, None, None, "warning", fix("Remove row", "drop_row")))
            return
        asked, said = seen.shape.compared(row)
        if not asked:
            return
        told = fingerprint(said)
        before, told_before = self._asked.setdefault(fingerprint(asked), (line, told))
        if told_before != told:
            rule, message, wrong = seen.shape.contradiction(row, before)
            question = shown(seen.shape.question(row), 120)
            self.say(line, RowFinding(rule, message, None, question, "warning" if wrong else "note", choice(before)))
