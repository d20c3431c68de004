"""Tables: CSV and TSV, with any delimiter, and Parquet."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from app.datasets.readers import _base
from app.datasets.readers._base import Raw
from app.datasets.readers._bytes import lines_of, text_of_line, too_long
from app.datasets.readers._repair import offer, windows_text
from app.errors import BadData
from app.formats._base import RowFinding, shown
from app.kit.json_safe import storable

_MAX_COLUMNS = 10_000


def read_csv(chunks: Iterator[bytes]) -> Iterator[Raw]:
    yield from _read_table(chunks, None)


def read_tsv(chunks: Iterator[bytes]) -> Iterator[Raw]:
    yield from _read_table(chunks, "\t")


class _TextLines:
    """Lines as text for the csv module, with their numbers and the problems since the last row."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._lines = lines_of(chunks)
        self.problem: RowFinding | None = None
        self.first = self.last = 1  # of the last row read
        self.whole = True  # whether the lines can be decoded all the same, as Windows-1252

    def __iter__(self) -> Iterator[str]:
        for number, line in self._lines:
            self.first, self.last = self.first or number, number
            if line is None:
                self.problem, self.whole = too_long(), False
                yield "\n"
                continue
            text = text_of_line(line)
            if isinstance(text, RowFinding):
                meant = windows_text(line)
                self.problem, self.whole = text, self.whole and meant is not None
                text = meant if meant is not None else line.decode("utf-8", "replace")
            if "\0" in text:
                self.problem = RowFinding("nul", "This line holds a NUL character. Remove it.", value=shown(text, 80))
                text, self.whole = text.replace("\0", ""), False
            yield text + "\n"


def _read_table(chunks: Iterator[bytes], delimiter: str | None) -> Iterator[Raw]:
    csv.field_size_limit(_base.MAX_LINE_BYTES)
    lines = _TextLines(chunks)
    feed = iter(lines)
    head = next((line for line in feed if line.strip()), "")
    delimiter = delimiter or max(",;\t|", key=lambda mark: (head.count(mark), mark == ","))
    reader = csv.reader(_chain_text(head, feed), delimiter=delimiter, strict=True)
    header = _header(reader)
    if lines.problem:
        yield Raw(lines.last, None, _of_header(lines.problem, lines.whole))
    while True:
        lines.problem, lines.whole, lines.first = None, True, 0
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Raw(lines.first, None, _csv_problem(error, lines.first, lines.last))
            continue
        line = lines.first
        if lines.problem:
            row = dict(zip(header, cells, strict=True)) if lines.whole and len(cells) == len(header) else None
            yield Raw(line, None, offer(lines.problem, row), row, as_json(cells, header))
        elif len(cells) == len(header):
            yield Raw(line, dict(zip(header, cells, strict=True)))
        elif any(cell.strip() for cell in cells):
            yield Raw(line, None, _ragged(cells, header, delimiter), None, as_json(cells, header))


def _chain_text(head: str, feed: Iterator[str]) -> Iterator[str]:
    yield head
    yield from feed


def _header(reader: Any) -> list[str]:
    try:
        names = [name.strip() for name in next(reader)]
    except (StopIteration, csv.Error) as error:
        raise BadData(
            f"The first line is not a header of column names ({error}).", hint="Begin the file with one line of names.", param="file"
        ) from None
    names = [name or f"column_{index + 1}" for index, name in enumerate(names)]
    check_names(names)
    return names


def check_names(names: list[str]) -> None:
    if len(names) > _MAX_COLUMNS:
        hint = f"Keep the ones to train on; at most {_MAX_COLUMNS:,} are read."
        raise BadData(f"The file has {len(names):,} columns.", hint=hint, param="file")
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise BadData(f"Two columns are called “{shown(twice, 60)}”.", hint="Give each column a name of its own.", param="file")


def as_json(cells: Sequence[Any], header: list[str]) -> str | None:
    """A row of too few or too many cells, so that a person can move them to their columns; None when it is too large."""
    if len(cells) > _MAX_COLUMNS:
        return None
    names = [*header, *(f"more_{n}" for n in range(1, len(cells) - len(header) + 1))]
    return json.dumps({name: cells[n] if n < len(cells) else "" for n, name in enumerate(names)}, ensure_ascii=False, indent=2)


def _of_header(problem: RowFinding, whole: bool) -> RowFinding:
    """A problem up to the header; the rows below it are valid all the same."""
    read = " The names were read as Windows-1252 writes them." if problem.rule == "not_utf8" and whole else ""
    return problem._replace(message=f"The line of column names: {problem.message}{read}", severity="warning")


def _csv_problem(error: csv.Error, first: int, last: int) -> RowFinding:
    if "unexpected end" in str(error):
        return RowFinding(
            "open_quote", f"A quote that opens in the row of line {first} is never closed. Double every quote inside a field."
        )
    if "field limit" in str(error) or "larger than field" in str(error):
        return RowFinding(
            "line_too_long",
            f"A field here is larger than {_base.MAX_LINE_BYTES >> 20} MiB; a quote may never be closed. Double every quote inside a field.",
        )
    return RowFinding("bad_quotes", f"The quotes of line {last} cannot be read: {error}. Double every quote inside a field.")


def _ragged(cells: list[str], header: list[str], delimiter: str) -> RowFinding:
    mark = {"\t": "tab", ";": "semicolon", "|": "bar"}.get(delimiter, "comma")
    advice = f"Put quotes around a field that holds a {mark}." if len(cells) > len(header) else "A field is missing."
    return RowFinding(
        "ragged", f"This row has {len(cells)} fields and the header has {len(header)}. {advice}", value=shown(delimiter.join(cells), 120)
    )


def read_parquet(path: Path) -> Iterator[Raw]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        check_names(file.schema_arrow.names)
        number, unpacked = 0, 0
        # A dictionary-encoded long text, referenced many times, is small in all of the file's own sizes, so the output is
        # measured.
        limit = max(path.stat().st_size * _base.MAX_RATIO, 64 << 20)
        for batch in file.iter_batches(batch_size=256, use_threads=False):
            for row in batch.to_pylist():
                number, unpacked = number + 1, unpacked + _weight(row)
                if unpacked > limit:
                    raise BadData(
                        f"The file unpacks to more than {limit:,} bytes, over {_base.MAX_RATIO} times its size.",
                        hint="This looks like a file made to fill a machine. Upload the rows as .jsonl.",
                        param="file",
                    )
                yield Raw(number, {storable(key): _plain_value(value) for key, value in row.items()})
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        if isinstance(error, pa.ArrowMemoryError):
            raise MemoryError from None
        raise BadData(
            f"The Parquet file cannot be read: {shown(str(error), 200)}.", hint="Write it again, or convert it to .jsonl.", param="file"
        ) from None


def _weight(value: Any) -> int:
    """Approximate bytes of a value's texts."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_weight, value.values()))
    return sum(map(_weight, value)) if isinstance(value, list) else 8


def _plain_value(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {storable(key): _plain_value(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_plain_value(item) for item in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
