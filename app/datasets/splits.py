"""Validation splits: random, stratified by label, or by group.

A row's side is a function of the seed and its content (or its group's name) alone, so it is the same in every attempt, every
process and any order of rows. Equal rows are never on both sides; metadata does not count as content, because a model does not
see it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from app import formats
from app.datasets.row_store import read_rows
from app.errors import BadData
from app.kit.json_safe import shortened

MAX_OVERLAPS = 2000
"""Rows on both sides that are listed. All of them are counted, and all can be removed at once."""
MAX_ROUNDS = 20
SHOWN_ROW_BYTES = 8 << 10


class NumberedRow(NamedTuple):
    """A normalized row and its line."""

    line: int
    row: dict[str, Any]


def divide(rows: Sequence[Any], fraction: float, seed: int, method: str = "random", column: str | None = None) -> list[bool]:
    """For each row, whether it is in the validation set. Each row has `line` and `row`; `method` is random, stratified or
    grouped.

    At least one row is in it where that leaves one for training. Raises BadData when the column does not exist.
    """
    if fraction <= 0 or len(rows) < 2:
        return [False] * len(rows)
    keys = [split_hash(row.row, seed) for row in rows]
    if method == "grouped":
        return _grouped(_joined([_value(row, column) for row in rows], keys), fraction, seed)
    if method == "random":
        return _first(keys, fraction)
    parts: dict[str, list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        parts[_value(row, column or "label")].append(place)
    held = [False] * len(rows)
    for places in parts.values():
        if len(places) > 1:
            for place, chosen in zip(places, _first([keys[place] for place in places], fraction), strict=True):
                held[place] = chosen
    taken = {key for key, out in zip(keys, held, strict=True) if out}
    held = [key in taken for key in keys]  # equal rows in two strata, which a metadata column can cause, stay together
    return held if not all(held) else [False] * len(rows)


def split_hash(row: dict[str, Any], seed: int | str) -> bytes:
    """The hash that decides a row's side: of the seed and everything a model sees of the row."""
    seen = {name: value for name, value in row.items() if name != "metadata"}
    return hashlib.sha256(f"{seed}\n{json.dumps(seen, sort_keys=True, ensure_ascii=False)}".encode()).digest()


def _first(keys: Sequence[bytes], fraction: float) -> list[bool]:
    """The rows with the smallest keys; rows with an equal key stay together."""
    last = sorted(keys)[max(1, round(fraction * len(keys))) - 1]
    held = [key <= last for key in keys]
    return held if not all(held) else [False] * len(keys)


def _joined(names: Sequence[str], keys: Sequence[bytes]) -> list[str]:
    """Group names, with groups that share an equal row merged, so that neither a row nor its groups are divided."""
    parent = {name: name for name in names}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = name = parent[parent[name]]
        return name

    first: dict[bytes, str] = {}
    for name, key in zip(names, keys, strict=True):
        ours, other = root(name), root(first.setdefault(key, name))
        parent[max(ours, other)] = min(ours, other)
    return [root(name) for name in names]


def _grouped(names: Sequence[str], fraction: float, seed: int) -> list[bool]:
    """Whole groups, in the order of their keys, as long as each brings the validation share nearer to `fraction`."""
    sizes = Counter(names)
    if len(sizes) < 2:
        raise BadData(
            "All rows are in one group, or their groups share equal rows, so none can be held out.",
            hint="Group by another column, take repeated rows out first, or split at random.",
        )
    wanted, taken, chosen = fraction * len(names), 0, set[str]()
    for name in sorted(sizes, key=lambda name: hashlib.sha256(f"{seed}\n{name}".encode()).digest()):
        if len(chosen) == len(sizes) - 1:
            break
        if not chosen or abs(taken + sizes[name] - wanted) < abs(taken - wanted):
            chosen.add(name)
            taken += sizes[name]
    return [name in chosen for name in names]


def _value(row: Any, column: str | None) -> str:
    holder = row.row if column == "label" and "label" in row.row else row.row.get("metadata", {})
    if column is None or column not in holder:
        known = ", ".join(sorted(set(row.row.get("metadata", {})) | ({"label"} if "label" in row.row else set()))[:20])
        raise BadData(
            f"Line {row.line} has no column “{column}” to split by." if column else "The column to split by is missing.",
            hint=f"Take one of {known}." if known else "Split at random: this dataset keeps no further columns.",
            param="split.column",
        )
    value = holder[column]
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)


# Looking at a split before it is used (in a child of the data worker) ---------------------------------------------------


def look(payload: dict[str, Any], say: Any) -> dict[str, Any]:
    """Preview of a split: rows and labels of both sides, and the overlap. `payload`: rows, fraction, seed, method, column; or
    `validation`, the rows of a validation file. `drop` is every line to remove so that no overlap is left."""
    rows = list(_read(Path(payload["rows"])))
    others = list(_read(Path(payload["validation"]))) if payload.get("validation") else None
    train, held = _sides(rows, others, payload)
    found = overlap(train, held)
    return {
        "train": len(train),
        "validation": len(held),
        "labels": _labels(train, held),
        "overlap": len(found),
        "whole": sum(how == "row" for _, _, how in found),
        "examples": [{"line": line, "train_line": other, "how": how} for line, other, how in found[:MAX_OVERLAPS]],
        "drop": _to_drop(rows, others, payload) if found else [],
    }


def side(payload: dict[str, Any], say: Any) -> dict[str, Any]:
    """`count` rows of one side from number `skip` on, in the order of the file, each with the overlapping line of the other side.
    `payload`: as for `look`, and `side`, train or validation."""
    rows = list(_read(Path(payload["rows"])))
    others = list(_read(Path(payload["validation"]))) if payload.get("validation") else None
    train, held = _sides(rows, others, payload)
    ours, theirs = (train, held) if payload["side"] == "train" else (held, train)
    shown = ours[payload["skip"] : payload["skip"] + payload["count"]]
    same = {line: other for line, other, _ in overlap(theirs, shown)}
    rows_ = [{"line": row.line, "row": shortened(row.row, SHOWN_ROW_BYTES)[0], "other_line": same.get(row.line)} for row in shown]
    return {"rows": rows_, "matches": len(ours)}


def _sides(
    rows: Sequence[NumberedRow], others: Sequence[NumberedRow] | None, payload: dict[str, Any]
) -> tuple[Sequence[NumberedRow], Sequence[NumberedRow]]:
    if others is not None:
        return rows, others
    sides = divide(rows, payload["fraction"], payload["seed"], payload["method"], payload.get("column"))
    return [row for row, out in zip(rows, sides, strict=True) if not out], [row for row, out in zip(rows, sides, strict=True) if out]


def _to_drop(rows: Sequence[NumberedRow], others: Sequence[NumberedRow] | None, payload: dict[str, Any]) -> list[int]:
    """Training lines that overlap with the validation set. Fewer rows may be split a little differently, so the split is repeated
    until nothing is on both sides."""
    dropped: set[int] = set()
    for _ in range(MAX_ROUNDS):
        train, held = _sides([row for row in rows if row.line not in dropped], others, payload)
        wholes, prompts = set[bytes](), set[bytes]()
        for row in held:
            prompt, text = formats.of(row.row).given_and_all(row.row)
            wholes.add(_print(text))
            if prompt:
                prompts.add(_print(prompt))
        more = {row.line for row in train if _shares(row, wholes, prompts)}
        if not more or len(more) == len(train):
            break
        dropped |= more
    return sorted(dropped)


def _shares(row: NumberedRow, wholes: set[bytes], prompts: set[bytes]) -> bool:
    prompt, text = formats.of(row.row).given_and_all(row.row)
    return _print(text) in wholes or bool(prompt and _print(prompt) in prompts)


def overlap(train: Iterable[Any], held: Iterable[Any]) -> list[tuple[int, int, str]]:
    """(validation line, training line, "row" or "prompt") for each validation row whose text, or whose prompt alone, is also
    trained on. Case, Unicode normalization and white space are ignored."""
    whole: dict[bytes, int] = {}
    prompts: dict[bytes, int] = {}
    for row in train:
        prompt, text = formats.of(row.row).given_and_all(row.row)
        whole.setdefault(_print(text), row.line)
        if prompt:
            prompts.setdefault(_print(prompt), row.line)
    found = []
    for row in held:
        prompt, text = formats.of(row.row).given_and_all(row.row)
        if (line := whole.get(_print(text))) is not None:
            found.append((row.line, line, "row"))
        elif prompt and (line := prompts.get(_print(prompt))) is not None:
            found.append((row.line, line, "prompt"))
    return found


def _print(text: str) -> bytes:
    plain = " ".join((text if text.isascii() else _composed(text)).casefold().split())
    return hashlib.blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=12).digest()


@functools.cache
def _crowded() -> re.Pattern[str]:
    """Thirty combining characters in a row, and another."""
    marks = "".join(character for code in range(sys.maxunicode + 1) if unicodedata.combining(character := chr(code)))
    return re.compile(f"[{marks}]{{30}}(?=[{marks}])")


def _composed(text: str) -> str:
    """The text in NFKC, made stream-safe first (Unicode Standard Annex 15, section 13): sorting the marks of one letter takes
    quadratic time."""
    return unicodedata.normalize("NFKC", _crowded().sub("\\g<0>\u034f", text))


def _labels(train: Sequence[Any], held: Sequence[Any]) -> list[list[Any]]:
    if not train or "label" not in train[0].row:
        return []
    left, right = (Counter(str(row.row["label"]) for row in side) for side in (train, held))
    return [[label, left[label], right[label]] for label, _ in (left + right).most_common(100)]


def _read(path: Path) -> Iterable[NumberedRow]:
    return (NumberedRow(line, json.loads(text)) for line, text in read_rows(path))
