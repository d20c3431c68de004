"""The report on a dataset: findings and statistics, collected in one streaming pass in bounded memory."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from typing import Any

from app.datasets.edits import check_normalised
from app.datasets.readers import Raw
from app.datasets.rules._base import seen
from app.formats import Format, RowFinding
from app.formats._base import MAX_NAME_LENGTH, Row, fingerprint, shown
from app.formats._messages import named
from app.kit.json_safe import shortened, storable

MAX_FINDINGS_PER_RULE = 5000
"""Findings listed per rule; all are counted, and a fix of a whole rule reaches every line (see `lines`)."""
PREVIEW_ROWS, PREVIEW_BYTES, PREVIEW_ROW_BYTES = 50, 256 << 10, 32 << 10
"""The report's preview of the first rows: their number, the bytes of JSON of all, and of one."""
MAX_LABELS, LABEL_CHARACTERS = 5000, 200
"""Labels that are counted: every set that a classifier may have (`MAX_CLASSES`), and the characters of one."""
MAX_ROLES = 50
"""Unknown roles that a person is asked about at once."""
MAX_REMEMBERED = 3_000_000
"""Rows whose fingerprint is kept to find duplicates: about 300 MB at most."""

Say = Any


class Report:
    """Collects everything the report says about the rows, in bounded memory."""

    def __init__(self, entry: Format, mapping: dict[str, str], say: Say) -> None:
        from app.datasets.rules import RULES  # it imports numpy, which the web process does not need

        self.entry, self.mapping, self.say = entry, mapping, say
        self.lines: dict[str, array[int]] = {}
        self._rules = [rule(self.add, entry, mapping) for rule in RULES]
        self.rows = self.good = self.characters = 0
        self.longest = 0
        self.found: dict[str, dict[str, Any]] = {}
        self.roles: Counter[str] = Counter()
        self.unknown_roles: Counter[str] = Counter()
        self.turns: Counter[int] = Counter()
        self.labels: Counter[str] = Counter()
        self.lengths: Counter[int] = Counter()
        self.preview: list[dict[str, Any]] = []
        self._room = PREVIEW_BYTES
        self._told: dict[str, int | None] = {}

    def check(self, raw: Raw) -> Row | None:
        """The normalized row, or None when it is excluded; reports all findings."""
        if raw.row is None:
            assert raw.problem is not None
            if raw.problem.severity == "error":
                self.rows += 1
            self.add(raw.line, raw.problem)
            return None
        self.rows += 1
        findings = self.entry.check(raw.row, self.mapping)
        for finding in findings:
            self.add(raw.line, finding)
        if any(finding.severity == "error" for finding in findings):
            return None
        row = self.entry.normalise(raw.row, self.mapping)
        metadata = self.entry.metadata(raw.row, self.mapping)
        if metadata:
            row["metadata"] = metadata
        self.good += 1
        return row

    def take(self, line: int, row: Row) -> bool:
        """Count a row that a person typed; False when it cannot be kept."""
        self.rows += 1
        findings = check_normalised(row, self.entry.shape)
        for finding in findings:
            self.add(line, finding)
        good = not any(finding.severity == "error" for finding in findings)
        self.good += good
        return good

    def add(self, line: int | None, finding: RowFinding) -> None:
        """Report a finding, once per row and rule: counts are numbers of rows, and a fix reaches all places of its row."""
        role = named(finding.value) if finding.rule == "wrong_role" else None
        if role and (role in self.unknown_roles or len(self.unknown_roles) < MAX_ROLES):
            self.unknown_roles[role] += 1
        if self._told.get(finding.rule, -1) == line:
            return
        self._told[finding.rule] = line
        entry = self.found.setdefault(finding.rule, {"severity": finding.severity, "count": 0, "message": finding.message})
        entry["count"] += 1
        if finding.fix is not None and line is not None:
            kept = self.lines.setdefault(finding.rule, array("q"))
            if len(kept) < MAX_REMEMBERED and (not kept or kept[-1] != line):
                kept.append(line)
        if entry["count"] <= MAX_FINDINGS_PER_RULE:
            value = None if finding.value is None else shown(finding.value)
            column = None if finding.column is None else shown(finding.column, MAX_NAME_LENGTH)
            told = {**finding._asdict(), "column": column, "value": value, "message": shown(finding.message, 600)}
            self.say({"finding": {"line": line, **told}})

    def count(self, row: Row, text: str, line: int) -> None:
        """Count a valid row, and examine its texts."""
        one = seen(line, row, text)
        length = sum(len(part) for _, part in one.texts)
        self.characters += length
        self.longest = max(self.longest, length)
        self.lengths[length.bit_length()] += 1
        if turns := one.shape.turns(row):
            self.roles.update(message["role"] for message in turns)
            self.turns[len(turns)] += 1
        if (label := one.shape.label(row)) is not None:
            label = label_name(label)
            if label in self.labels or len(self.labels) < 20_000:
                self.labels[label] += 1
        for rule in self._rules:
            rule.see(one)
        if len(self.preview) < PREVIEW_ROWS and self._room > 0:
            short, cut = shortened(row, min(PREVIEW_ROW_BYTES, self._room))
            self._room -= len(json.dumps(short, ensure_ascii=False))
            self.preview.append({"line": line, "row": short, **({"cut": True} if cut else {})})

    def finish(self) -> None:
        if self.good == 0:
            return
        for rule in self._rules:
            rule.finish()

    def result(self) -> dict[str, Any]:
        return {
            "findings": self.found,
            "characters": self.characters,
            "longest_characters": self.longest,
            "lengths": [[0 if bits == 0 else 1 << (bits - 1), count] for bits, count in sorted(self.lengths.items())],
            "roles": dict(self.roles.most_common()),
            "unknown_roles": dict(self.unknown_roles.most_common()),
            "turns": sorted(self.turns.items())[:200],
            "labels": dict(self.labels.most_common(MAX_LABELS)),
            "label_count": len(self.labels),
            "preview": self.preview,
        }


def label_name(label: str) -> str:
    """A label as it is counted and shown: a long one is truncated, with its fingerprint, so that it stays distinct."""
    short = label if len(label) <= LABEL_CHARACTERS else f"{label[:LABEL_CHARACTERS]}… ({fingerprint(label):016x})"
    return str(storable(short))
