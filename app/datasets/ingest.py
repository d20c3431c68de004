"""Parses an uploaded file into rows: detect its format, check every row, write the valid ones as Parquet, count.

Runs in a limited child (`app/kit/sandbox.py`), because the bytes are untrusted: `read(payload, say)`. By hand: `python -m
app.datasets.ingest FILE [--format chat]` prints the result.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from app import formats
from app.datasets import readers
from app.datasets.edits import Edits
from app.datasets.readers import Raw
from app.datasets.report import Report
from app.datasets.row_store import RowsFile
from app.errors import BadData
from app.formats import Format, RowFinding
from app.formats._base import MAX_NAME_LENGTH, Row, columns_of, shown

VERSION = 6
"""Version of the parser, increased when the same file would be parsed differently, so that older results are not reused."""

SAMPLE_ROWS = 200
MAX_COLUMNS = 10_000
MAPPED_COLUMNS = 500
"""Columns that an error lists, to choose from; a mapping may name any."""
SHOWN_ROWS, SHOWN_COLUMNS, SHOWN_CHARACTERS = 5, 60, 160
"""Preview of the file as it is, for a person who maps its columns."""
Say = Any
CounterOf = Callable[[str, Callable[[int, RowFinding], None]], Any]


def read(payload: dict[str, Any], say: Say, counter_of: CounterOf | None = None) -> dict[str, Any]:
    """Parse one file. `payload`: path, filename, format or null, mapping or null, edits, rows and lines (output paths), and the
    reason for the format where an earlier version found it.

    A counter sees every valid row and adds columns to the report: `counter_of(task, add)` makes one, by which
    `worker/data/inspection.py` supplies the trainer's own renderer and tokenizer.

    Sends `{"progress": fraction}` and `{"finding": {…}}`; returns counts, the mapping, a preview and the hash of the rows. Raises
    BadData, with the line in its `details`, when no row could be parsed at all.
    """
    try:
        return _read(payload, say, counter_of)
    except BadData as error:
        error.details = {"line": 1} | getattr(error, "details", {})
        raise


def _read(payload: dict[str, Any], say: Say, counter_of: CounterOf | None) -> dict[str, Any]:
    path = Path(payload["path"])
    edits = Edits(payload.get("edits") or ())
    raws = _repaired(numbered(_with_progress(readers.read(path, payload["filename"]), path, payload["filename"], say)), edits)
    head = list(itertools.islice(raws, SAMPLE_ROWS))
    sample = [raw.row for raw in head if raw.row is not None]
    if not sample:
        raise _no_rows(head)
    wished = payload.get("format")
    try:
        entry, mapping, reason, others = _choose(sample, wished, payload.get("mapping"))
    except BadData as error:
        error.details = _to_map(sample, wished)
        raise
    reason = payload.get("reason") or reason
    report = Report(entry, mapping, say)
    counter = counter_of(entry.task, report.add) if counter_of else None
    with RowsFile(Path(payload["rows"])) as rows:
        for raw in itertools.chain(head, raws):
            row = _row_of(raw, edits, report)
            if row is None:
                continue
            text = json.dumps(row, ensure_ascii=False)
            rows.add(raw.line, text)
            report.count(row, text, raw.line)
            if counter:
                counter.add(row, raw.line)
    counted = counter.result() if counter else {}
    report.finish()
    if payload.get("lines"):
        Path(payload["lines"]).write_text(json.dumps({rule: lines.tolist() for rule, lines in report.lines.items()}))
    return {
        "format": entry.name,
        "task": entry.task,
        "mapping": mapping,
        "rows": report.rows,
        "good_rows": report.good,
        "sha256": rows.sha256,
        "report": report.result()
        | {
            "reason": reason,
            "other_formats": others,
            "mappings": formats.suggest(sample)[1],
            "columns": _shown_columns(sample),
            "first": _first(sample),
            "version": VERSION,
        }
        | counted.get("report", {}),
        "lengths": counted.get("lengths"),
    }


def numbered(raws: Iterator[Raw]) -> Iterator[Raw]:
    """The rows, each with a number of its own: several on one line are numbered consecutively from it."""
    last = 0
    for raw in raws:
        if raw.row is not None or (raw.problem and raw.problem.severity == "error"):
            last = max(raw.line, last + 1)
            raw = raw._replace(line=last)
        yield raw


def _repaired(raws: Iterator[Raw], edits: Edits) -> Iterator[Raw]:
    """The rows, with unparsable ones repaired where this version says so."""
    for raw in raws:
        yield Raw(raw.line, raw.repaired) if raw.row is None and raw.repaired is not None and edits.repairs(raw.line) else raw


def _row_of(raw: Raw, edits: Edits, report: Report) -> Row | None:
    """The valid row of a raw one, with this version's edits applied; None when it is excluded."""
    if not edits.touches(raw.line):
        return report.check(raw)
    row, typed = edits.apply(raw.line, raw.row or {}, report.entry, report.mapping)
    if typed is not None:
        return typed if report.take(raw.line, typed) else None
    if row is None:
        return None
    return report.check(raw if raw.row is None and not row else Raw(raw.line, row))


def _no_rows(head: Sequence[Raw]) -> BadData:
    first = next((raw for raw in head if raw.problem and raw.problem.severity == "error"), None)
    if first is None or first.problem is None:
        return BadData("The file holds no row.", hint="Upload a file with at least one row.", param="file")
    count = sum(raw.problem is not None and raw.problem.severity == "error" for raw in head)
    error = BadData(
        f"{'The only row cannot' if count == 1 else f'None of the first {count} rows can'} be read. Line {first.line}: {first.problem.message}",
        hint="Fix the file and upload it again, or save it in another of the accepted formats.",
        param="file",
    )
    able = sum(raw.repaired is not None for raw in head)
    error.details = {
        "line": first.line,
        "column": first.problem.column,
        "rule": first.problem.rule,
        "value": first.problem.value,
        "repair": first.problem.fix["label"] if first.problem.fix and able > count / 2 else None,
    }
    return error


def _choose(sample: list[Row], name: str | None, mapping: dict[str, str] | None) -> tuple[Format, dict[str, str], str, list[str]]:
    """The format, its mapping, the reason, and which other formats would fit. A person's choice is used as it is."""
    ranked = formats.rank(sample)
    others = [entry.name for entry, _ in ranked]
    columns = [column for column in columns_of(sample) if len(column) <= MAX_NAME_LENGTH]
    if name:
        entry = formats.get(name)
        # An empty name means that no column is used, even where one would be detected.
        said = mapping or {}
        guessed = {field: column for field, column in entry.guess_mapping(columns).items() if column not in said.values()}
        mapping = {field: column for field, column in (guessed | said).items() if column}
        _check_mapping(entry, mapping, columns)
        return entry, mapping, "Chosen by you.", others
    if not ranked:
        named = ", ".join(f"“{shown(column, 40)}”" for column in formats.judging(sample))
        hint = f" The column {named} seems to mark bad answers, and no format has a field for it." if named else ""
        raise BadData(
            f"We could not match the columns {', '.join(f'“{shown(column, 40)}”' for column in columns[:12])} to a format.{hint}",
            hint="Map them: choose a format and a column for each of its fields.",
            param="file",
            code="unknown_format",
        )
    entry, guess = ranked[0]
    return entry, guess.mapping, guess.reason, others[1:]


def _to_map(sample: list[Row], wished: str | None) -> dict[str, Any]:
    """What a person or program needs to map the columns: their names, the first rows, and what the values look like."""
    best, mappings = formats.suggest(sample)
    best = wished or best
    return {
        "columns": _shown_columns(sample)[:MAPPED_COLUMNS],
        "preview": _first(sample),
        "suggested": {"format": best, "mapping": mappings[best]} if best else None,
        "mappings": mappings,
    }


def _first(sample: list[Row]) -> list[Row]:
    """The first rows as they are in the file, long values shortened."""
    names = _shown_columns(sample)[:SHOWN_COLUMNS]
    return [{name: shown(row[name], SHOWN_CHARACTERS) for name in names if row.get(name) is not None} for row in sample[:SHOWN_ROWS]]


def _shown_columns(sample: list[Row]) -> list[str]:
    return [column for column in columns_of(sample) if len(column) <= MAX_NAME_LENGTH][:MAX_COLUMNS]


def _check_mapping(entry: Format, mapping: dict[str, str], columns: list[str]) -> None:
    known = {field.name for field in entry.fields}
    for field, column in mapping.items():
        if field not in known or column not in columns:
            raise BadData(
                f"The mapping says that “{shown(field, 40)}” is the column “{shown(column, 40)}”, and there is no such {'column' if field in known else 'field'}.",
                hint=f"Fields of {entry.title}: {', '.join(known)}. Columns of the file: {', '.join(shown(c, 40) for c in columns[:20])}.",
                param="mapping",
            )
    missing = [field.name for field in entry.fields if field.required and field.name not in mapping]
    if missing:
        raise BadData(
            f"{entry.title} needs a column for {', '.join(f'“{name}”' for name in missing)}.",
            hint=f"Choose it among the columns {', '.join(shown(c, 40) for c in columns[:20])}.",
            param="mapping",
            code="incomplete_mapping",
        )


def _with_progress(raws: Iterator[Raw], path: Path, filename: str, say: Say) -> Iterator[Raw]:
    """The rows; sends the fraction of the file that was read about twice a second."""
    size, last, line = max(1, path.stat().st_size), time.monotonic(), 0
    in_all = _rows_in_all(path, filename)
    try:
        for count, raw in enumerate(raws):
            line = raw.line
            if count % 256 == 0 and time.monotonic() - last > 0.4:
                last = time.monotonic()
                share = count / in_all if in_all else _offset(path) / size
                say({"progress": min(0.99, share), "rows": count, "line": line})
            yield raw
    except BadData as error:  # where a container is broken is known only from how far its rows came
        error.details = {"line": line + 1} | getattr(error, "details", {})
        raise


def _rows_in_all(path: Path, filename: str) -> int:
    """Number of rows in a Parquet file's metadata; 0 where unknown. Arrow reads without moving a file offset."""
    if not filename.lower().endswith((".parquet", ".pq")):
        return 0
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_metadata(path).num_rows
    except (pa.ArrowException, OSError):  # the reader reports what is wrong with it
        return 0


def _offset(path: Path) -> int:
    """How far this process has read the file, from the kernel: no reader needs to keep count."""
    target = str(path.resolve())
    for handle in Path("/proc/self/fd").iterdir():
        try:
            if str(handle.readlink()) == target:
                return int(Path(f"/proc/self/fdinfo/{handle.name}").read_text().split()[1])
        except (OSError, ValueError):
            continue
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m app.datasets.ingest", description="Read a dataset file and print what was found.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--format", choices=list(formats.FORMATS))
    parser.add_argument("--rows", type=Path, default=Path("rows.parquet"), help="where the valid rows go")
    options = parser.parse_args(arguments)
    payload = {
        "path": options.file,
        "filename": options.file.name,
        "format": options.format,
        "rows": options.rows,
    }

    def say(message: dict[str, Any]) -> None:
        if "finding" in message:
            finding = message["finding"]
            print(f"line {finding['line']}: {finding['severity']}: {finding['message']}", file=sys.stderr)

    try:
        result = read(payload, say)
    except BadData as error:
        print(error, file=sys.stderr)
        return 1
    result["report"].pop("preview")
    print(json.dumps(result, indent=2, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
