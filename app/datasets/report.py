"""The report on a dataset: findings and statistics, collected in one streaming pass in bounded memory."""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections import Counter
from collections.abc import Iterator
from typing import Any

from app.datasets.edits import CONTROL, check_normalised, markers
from app.datasets.issue_names import choice
from app.datasets.readers import Raw
from app.datasets.rules._base import calls_of, seen
from app.formats import Finding, Format
from app.formats._base import MAX_NAME_LENGTH, Row, Severity, fix, shown
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
        self._rules = [rule(self.add, entry.task) for rule in RULES]
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
        self._seen: dict[int, int] = {}
        self._prompts: dict[int, tuple[int, int]] = {}

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

    def add(self, line: int | None, finding: Finding) -> None:
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
        """Count a valid row, and check its texts."""
        parts = list(texts(row))
        length = sum(len(part) for _, part in parts)
        for column, part in parts:
            self._look_at(line, column, part)
        self.characters += length
        self.longest = max(self.longest, length)
        self.lengths[length.bit_length()] += 1
        if "messages" in row:
            self.roles.update(message["role"] for message in row["messages"])
            self.turns[len(row["messages"])] += 1
        if "label" in row:
            label = _name(row["label"])
            if label in self.labels or len(self.labels) < 20_000:
                self.labels[label] += 1
        elif "good" in row:
            self.labels["good" if row["good"] else "bad"] += 1
        self._compare(row, text, line)
        one = seen(line, row, parts)
        for rule in self._rules:
            rule.see(one)
        if len(self.preview) < PREVIEW_ROWS and self._room > 0:
            short, cut = shortened(row, min(PREVIEW_ROW_BYTES, self._room))
            self._room -= len(json.dumps(short, ensure_ascii=False))
            self.preview.append({"line": line, "row": short, **({"cut": True} if cut else {})})

    def _look_at(self, line: int, column: str, part: str) -> None:
        found = CONTROL.search(part)
        if found is not None:
            message = f"The text holds the control character {found.group()!r}."
            repair = fix("Remove it", "strip_control")
            self.add(line, Finding("control_character", message, column, _around(part, found), "warning", repair))
        found = next(markers(part), None)
        if found is not None:
            message = f"The text holds “{found.group()}”, which chat templates use to mark turns; the model would be trained to write it."
            repair = fix("Remove it", "strip_markers")
            self.add(line, Finding("template_marker", message, column, _around(part, found), "warning", repair))

    def _compare(self, row: Row, text: str, line: int) -> None:
        if len(self._seen) >= MAX_REMEMBERED:
            return
        content = {key: value for key, value in row.items() if key != "metadata"}
        print_ = _fingerprint(text if "metadata" not in row else json.dumps(content, ensure_ascii=False))
        first = self._seen.setdefault(print_, line)
        if first != line:
            message = f"This row is the same as line {first}."
            self.add(line, Finding("duplicate", message, None, None, "warning", fix("Remove row", "drop_row")))
            return
        asked, said = _question(row)
        if not asked:
            return
        said_ = _fingerprint(said)
        before, said_before = self._prompts.setdefault(_fingerprint(asked), (line, said_))
        if said_before == said_:
            return
        if self.entry.task == "preference":
            same = "the same two answers the other way round" if "chosen" in row else f"the same answer {'bad' if row['good'] else 'good'}"
            message = f"Line {before} {'ranks' if 'chosen' in row else 'calls'} {same}. One of the two is wrong."
            self.add(line, Finding("opposite_verdict", message, None, shown(_last(row["messages"]), 120), "warning", choice(before)))
            return
        labeled = self.entry.task == "classification"
        rule = "other_label" if labeled else "other_answer"
        severity: Severity = "warning" if labeled else "note"
        message = f"Line {before} has the same input and another {'label' if labeled else 'answer'}."
        self.add(line, Finding(rule, message, None, shown(_shown_question(row), 120), severity, choice(before)))

    def finish(self) -> None:
        if self.good == 0:
            return
        for rule in self._rules:
            rule.finish()
        if self.entry.task == "classification":
            return
        if self.entry.shape == "rated" and len(self.labels) == 1:
            only = next(iter(self.labels))
            message = f"Every answer is rated {only}; training needs both kinds."
            self.add(None, Finding("one_class", message, self.mapping.get("label"), only, "warning"))
        if self.good < 10:
            message = f"Only {self.good} valid row{'s' if self.good != 1 else ''}: enough to try things out, too few to train on. A few dozen valid rows already show an effect."
            self.add(None, Finding("few_rows", message, severity="warning"))

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


def texts(row: Row) -> Iterator[tuple[str, str]]:
    """Every text of a normalized row that a model would see, with its path."""
    for key in ("text", "prompt", "completion"):
        if key in row:
            yield key, row[key]
    for key in ("messages", "chosen", "rejected", "answer"):
        for index, message in enumerate(row.get(key, ())):
            yield f"{key}[{index}].content", message["content"]
            if calls := calls_of(message):
                yield f"{key}[{index}].tool_calls", calls


def _question(row: Row) -> tuple[str, str]:
    """(what two rows must share to be compared, the part in which they may then conflict).

    A prompt has an answer or a label; a prompt with an answer has a rating; a prompt with two answers has the preferred one.
    """
    if "label" in row:
        return row["text"], row["label"]
    if "completion" in row:
        return row["prompt"], row["completion"]
    if "chosen" in row:
        better, worse = (json.dumps(row[key], ensure_ascii=False) for key in ("chosen", "rejected"))
        return json.dumps([row["messages"], *sorted((better, worse))], ensure_ascii=False), better
    if "answer" in row:
        return json.dumps([row["messages"], row["answer"]], ensure_ascii=False), str(row["good"])
    if "messages" in row:
        *before, last = row["messages"]
        return json.dumps(before, ensure_ascii=False), last["content"] + calls_of(last)
    return "", ""


def _shown_question(row: Row) -> str:
    return row.get("text") or row.get("prompt") or _last(row.get("messages", [])[:-1])


def _last(messages: list[Row]) -> str:
    return messages[-1]["content"] if messages else ""


def _around(text: str, found: re.Match[str]) -> str:
    return text[max(0, found.start() - 30) : found.end() + 30]


def _fingerprint(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def _name(label: str) -> str:
    """A label as it is counted and shown: a long one is shortened, with a fingerprint to distinguish equal beginnings."""
    short = label if len(label) <= LABEL_CHARACTERS else f"{label[:LABEL_CHARACTERS]}… ({_fingerprint(label):016x})"
    return str(storable(short))
