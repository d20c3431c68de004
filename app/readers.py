"""Streaming readers: the rows of a file one by one, in bounded memory, each with its line, or what is wrong there.

A reader never raises for what one line holds: it gives a `Raw` with a problem and goes on. What makes the whole file
unreadable is a `Raw` without a row at the line where it shows. Files are told apart by their extension; `.gz` and
`.zip` are opened on the way.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from app.errors import BadData, Unsupported
from app.formats._base import Finding, Row, shown

LONGEST_LINE_BYTES = 16 << 20
"""A longer line, field or element is reported and skipped without being held in memory."""
LONGEST_PASSAGE = 4000
"""Plain text is cut into passages of at most this many characters, so that a trainer's maximum length loses none of it."""
MOST_UNPACKED_BYTES = 64 << 30
LARGEST_RATIO = 200
_CHUNK = 1 << 20

EXTENSIONS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".txt": "txt",
    ".text": "txt",
    ".md": "txt",
    ".parquet": "parquet",
    ".pq": "parquet",
}
PACKED = (".gz", ".zip")
ACCEPTED = ".jsonl, .json, .csv, .tsv, .txt and .parquet, and any of these as .gz or .zip"


class Raw(NamedTuple):
    """A row, or a problem, at a line (1-based; for Parquet, and inside one-line JSON, the record)."""

    line: int
    row: Row | None
    problem: Finding | None = None


def kind_of(filename: str) -> str:
    """jsonl, json, csv, tsv, txt or parquet. Raises Unsupported for an extension no reader takes."""
    path = Path(filename.lower())
    suffixes = path.suffixes
    if suffixes and suffixes[-1] == ".zip":
        return "zip"
    if suffixes and suffixes[-1] == ".gz":
        suffixes = suffixes[:-1]
    kind = EXTENSIONS.get(suffixes[-1]) if suffixes else None
    if kind is None:
        raise Unsupported(
            f"“{shown(filename, 80)}” has an extension that no reader here takes.",
            way_out=f"Save it as one of {ACCEPTED}.",
            param="file",
        )
    return kind


def read(path: Path, filename: str) -> Iterator[Raw]:
    """The rows of a file, read as its name says. Raises BadData when it is empty or cannot be opened as that at all."""
    kind = kind_of(filename)
    if path.stat().st_size == 0:
        raise BadData("The file is empty.", way_out="Upload a file with at least one row.", param="file")
    if kind == "zip":
        yield from _read_zip(path)
        return
    if kind == "parquet":
        yield from _read_parquet(path, packed=filename.lower().endswith(".gz"))
        return
    with path.open("rb") as opened:
        packed = filename.lower().endswith(".gz")
        stream: BinaryIO = _Unpacked(gzip.GzipFile(fileobj=opened), path.stat().st_size) if packed else opened  # type: ignore[assignment]
        try:
            yield from _read_stream(stream, kind)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise BadData(f"The gzip file is broken: {error}.", way_out="Pack it again, or upload it unpacked.", param="file") from None


def _read_stream(stream: BinaryIO, kind: str) -> Iterator[Raw]:
    chunks, notes = _decode_marks(stream)
    yield from notes
    yield from READERS[kind](chunks)


# Bytes --------------------------------------------------------------------------------------------------------------


class _Unpacked(io.RawIOBase):
    """A stream that unpacks, and refuses to become a bomb."""

    def __init__(self, inner: BinaryIO | gzip.GzipFile, packed_bytes: int) -> None:
        self.inner = inner
        self.limit = min(MOST_UNPACKED_BYTES, max(packed_bytes * LARGEST_RATIO, 64 << 20))
        self.count = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self.inner.read(_CHUNK if size < 0 else min(size, _CHUNK))
        self.count += len(data)
        if self.count > self.limit:
            raise BadData(
                f"The file unpacks to more than {self.limit:,} bytes, over {LARGEST_RATIO} times its size.",
                way_out="This looks like an archive made to fill a disk. Upload the file unpacked.",
                param="file",
            )
        return data


def _decode_marks(stream: BinaryIO) -> tuple[Iterator[bytes], list[Raw]]:
    """The file's bytes as UTF-8 chunks without a byte order mark, and notes about what was found instead."""
    head = stream.read(_CHUNK)
    notes: list[Raw] = []
    if head.startswith(codecs.BOM_UTF8):
        head = head[3:]
        notes.append(Raw(1, None, Finding("bom", "The file begins with a byte order mark, which was skipped.", severity="note")))
    else:
        encoding = _utf_16_or_32(head)
        if encoding:
            text = f"The file is {encoding.upper()}, not UTF-8; it was converted."
            notes.append(Raw(1, None, Finding("utf_16", text, severity="note")))
            return _converted(head, stream, encoding), notes
    return _chunks(head, stream), notes


def _utf_16_or_32(head: bytes) -> str | None:
    for mark, encoding in (
        (codecs.BOM_UTF32_LE, "utf-32"),
        (codecs.BOM_UTF32_BE, "utf-32"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if head.startswith(mark):
            return encoding
    sample = head[:4096]
    # Latin text in UTF-16 has a zero in every other byte; UTF-8 text has none at all.
    if len(sample) >= 8 and sample.count(0) >= len(sample) * 0.35:
        return "utf-16-le" if sample[1::2].count(0) > sample[0::2].count(0) else "utf-16-be"
    return None


def _chunks(head: bytes, stream: BinaryIO) -> Iterator[bytes]:
    while head:
        yield head
        head = stream.read(_CHUNK)


def _converted(head: bytes, stream: BinaryIO, encoding: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)("strict")
    try:
        for chunk in _chunks(head, stream):
            yield decoder.decode(chunk).encode("utf-8", "surrogatepass")
        yield decoder.decode(b"", True).encode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise BadData(
            f"The file begins as {encoding.upper()} but is broken: {error.reason}.",
            way_out="Save it as UTF-8 and upload it again.",
            param="file",
        ) from None


def _lines(chunks: Iterator[bytes]) -> Iterator[tuple[int, bytes | None]]:
    """(number, line without its end), or (number, None) for a line too long to be held."""
    number, rest, too_long = 1, b"", False
    parts: list[bytes] = []
    held = 0
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        parts.append(first)
        held += len(first)
        if held > LONGEST_LINE_BYTES:
            too_long, parts, held = True, [], 0
        for other in others:
            yield number, None if too_long else b"".join(parts).removesuffix(b"\r")
            number, too_long, parts, held = number + 1, False, [other], len(other)
    rest = b"".join(parts).removesuffix(b"\r")
    if rest or too_long:
        yield number, None if too_long else rest


def _text(line: bytes) -> str | Finding:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        before = line[max(0, error.start - 20) : error.start + 20].decode("cp1252", "replace")
        return Finding(
            "not_utf8",
            f"Byte {error.start + 1} of this line is not UTF-8. If the file is from Windows, its encoding may be cp1252. Save it as UTF-8.",
            value=shown(before),
        )


def _too_long(what: str = "line") -> Finding:
    return Finding(
        "line_too_long",
        f"This {what} is longer than {LONGEST_LINE_BYTES >> 20} MiB and was skipped. Write one row per line, or split this row.",
    )


# JSON ---------------------------------------------------------------------------------------------------------------


class _Odd(ValueError):
    """JSON that Python would let through and that must not be."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.message)
        self.finding = finding


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _Odd(
            Finding("duplicate_key", f"The key “{shown(twice, 60)}” stands twice in one object. Keep one of them.", shown(twice, 60))
        )
    return result


def _constant(name: str) -> Any:
    raise _Odd(Finding("not_a_number", f"{name} is not JSON. Write null or a number.", value=name))


_decoder = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_constant)
_surrogates = re.compile("[\ud800-\udfff]")


def parse_json(text: str) -> Row | Finding:
    """One row from its JSON text, or what is wrong with it."""
    try:
        value = _decoder.decode(text)
    except _Odd as odd:
        return odd.finding
    except RecursionError:
        return Finding("too_deep", "This JSON is nested deeper than can be read. Flatten it.", value=shown(text, 60))
    except json.JSONDecodeError as error:
        return Finding(
            "invalid_json",
            f"Not valid JSON: {error.msg} at character {error.pos + 1}. {_hint(text, error)}".strip(),
            value=shown(text, 120),
        )
    except ValueError as error:  # an integer of more than 4,300 digits
        return Finding("invalid_json", f"Not valid JSON: {str(error)[:120]}.", value=shown(text, 60))
    if not isinstance(value, dict):
        kind = {list: "a list", str: "a text", bool: "a truth value", type(None): "null"}.get(type(value), "a number")
        return Finding("wrong_shape", f'A row must be an object like {{"prompt": …}}, and this is {kind}.', value=shown(value, 120))
    if "\\u" in text.lower() and (found := _lone_surrogate(value)):
        return found
    return value


def _hint(text: str, error: json.JSONDecodeError) -> str:
    stripped = text.strip()
    if error.msg.startswith("Extra data"):
        return "Two rows may stand on one line: write each on a line of its own."
    if stripped in ("{", "[") or (stripped.startswith("{") and error.pos >= len(text.rstrip())):
        return "The object does not end on this line: in a .jsonl file every row stands on one line; name a pretty-printed file .json."
    if stripped.startswith("{'") or "': '" in stripped:
        return "JSON needs double quotes, as Python's json.dumps writes them."
    if re.search(r",\s*[}\]]", text[max(0, error.pos - 20) : error.pos + 2]):
        return "Take away the comma before the closing bracket."
    if "control character" in error.msg:
        return "Write line breaks as \\n and tabs as \\t inside a text, and remove other control characters."
    return ""


def _lone_surrogate(value: Any, column: str = "") -> Finding | None:
    if isinstance(value, str):
        found = _surrogates.search(value)
        return found and Finding(
            "lone_surrogate",
            f"The text holds half of a character (\\u{ord(found.group()):04x}), as is left when an emoji is cut in two. Write the whole character.",
            column or None,
            shown(value),
        )
    if isinstance(value, dict):
        pairs = [(item, f"{column}.{shown(key, 60)}" if column else shown(key, 60)) for key, item in value.items()]
        pairs += [(key, column) for key in value]
    elif isinstance(value, list):
        pairs = [(item, f"{column}[{index}]") for index, item in enumerate(value)]
    else:
        return None
    return next((finding for item, at in pairs if (finding := _lone_surrogate(item, at))), None)


def _row(line: int, data: bytes) -> Raw:
    text = _text(data)
    if isinstance(text, Finding):
        return Raw(line, None, text)
    row = parse_json(text)
    return Raw(line, None, row) if isinstance(row, Finding) else Raw(line, row)


def _peek(chunks: Iterator[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """The first byte that is not white space, and all the chunks again."""
    seen: list[bytes] = []
    first = b""
    for chunk in chunks:
        seen.append(chunk)
        first = chunk.lstrip()[:1]
        if first or len(seen) > 8:
            break

    def again() -> Iterator[bytes]:
        while seen:
            yield seen.pop(0)
        yield from chunks

    return first, again()


def _read_jsonl(chunks: Iterator[bytes]) -> Iterator[Raw]:
    first, chunks = _peek(chunks)
    if first == b"[":
        yield Raw(1, None, Finding("json_array", "The file holds one JSON list, so it was read as .json.", severity="note"))
        yield from _elements(chunks)
        return
    for number, line in _lines(chunks):
        if line is None:
            yield Raw(number, None, _too_long())
        elif line.strip():
            yield _row(number, line)


_WRAPPED = re.compile(rb'\s*\{\s*"(?:data|rows|train|examples|items|records|dataset)"\s*:\s*(?=\[)')


def _read_json(chunks: Iterator[bytes]) -> Iterator[Raw]:
    first, chunks = _peek(chunks)
    if first == b"[":
        yield from _elements(chunks)
        return
    if first != b"{":
        yield from _read_jsonl(chunks)
        return
    head = next(chunks)
    wrapped = _WRAPPED.match(head)
    if wrapped:  # {"data": [row, row, …]}
        yield from _elements(_chain(head[wrapped.end() :], chunks))
    else:  # objects one after the other, on lines of their own or pretty-printed
        cutter = _Cutter(array=False)
        for chunk in _chain(head, chunks):
            yield from (_cut_row(*item) for item in cutter.feed(chunk))
        yield from (_cut_row(*item) for item in cutter.emit())


def _chain(head: bytes, chunks: Iterator[bytes]) -> Iterator[bytes]:
    yield head
    yield from chunks


def _elements(chunks: Iterator[bytes]) -> Iterator[Raw]:
    cutter = _Cutter(array=True)
    for chunk in chunks:
        yield from (_cut_row(*item) for item in cutter.feed(chunk))
        if cutter.done:
            return
    yield from (_cut_row(*item) for item in cutter.emit())
    text = "The list does not end with “]”: the file may have been cut off. The rows before this line were read."
    yield Raw(cutter.line, None, Finding("invalid_json", text))


def _cut_row(line: int, data: bytes | None) -> Raw:
    return Raw(line, None, _too_long("element")) if data is None else _row(line, data)


_STRUCTURE = re.compile(rb'["{}\[\],]')
_IN_TEXT = re.compile(rb'["\\]')


class _Cutter:
    """Cuts a JSON array, or objects that follow each other, into pieces by their brackets alone.

    Each piece is parsed by itself afterwards, so a broken one harms no other, and depth costs nothing but a counter.
    """

    def __init__(self, *, array: bool) -> None:
        self.array = array
        self.done = False
        self.line = 1
        self._start_line = 1
        self._buffer = bytearray()
        self._too_long = False
        self._depth = 0
        self._in_text = False
        self._escaped = False

    def feed(self, chunk: bytes) -> Iterator[tuple[int, bytes | None]]:
        """The pieces that end in this chunk, as (line, bytes); None for one too long to be held."""
        at = taken = 0
        while True:
            if self._escaped and at < len(chunk):
                self._escaped, at = False, at + 1
            match = None if self._escaped else (_IN_TEXT if self._in_text else _STRUCTURE).search(chunk, at)
            if match is None:
                self._take(chunk[taken:])
                return
            token, at = match.group(), match.end()
            if self._in_text:
                self._escaped, self._in_text = token == b"\\", token == b"\\"
            elif token == b'"':
                self._in_text = True
            elif token in b"{[":
                self._depth += 1
                if self.array and self._depth == 1:  # the bracket of the list itself
                    self.line += chunk.count(b"\n", 0, at)
                    taken = at
            elif token == b",":
                if self.array and self._depth == 1:
                    self._take(chunk[taken : at - 1])
                    yield from self.emit(always=True)
                    taken = at
            else:
                self._depth = max(0, self._depth - 1)
                if self._depth == 0:
                    self._take(chunk[taken : at - 1] if self.array else chunk[taken:at])
                    yield from self.emit()
                    taken = at
                    if self.array:
                        self.done = True
                        return

    def emit(self, *, always: bool = False) -> Iterator[tuple[int, bytes | None]]:
        if self._buffer or self._too_long or always:
            yield self._start_line, None if self._too_long else bytes(self._buffer)
        self._buffer, self._too_long = bytearray(), False

    def _take(self, part: bytes) -> None:
        if self._buffer:
            self._buffer += part
        elif not self._too_long:
            stripped = part.lstrip()
            self._start_line = self.line + part.count(b"\n", 0, len(part) - len(stripped))
            self._buffer += stripped
        self.line += part.count(b"\n")
        if len(self._buffer) > LONGEST_LINE_BYTES:
            self._too_long, self._buffer = True, bytearray()


# Tables -------------------------------------------------------------------------------------------------------------


def _read_csv(chunks: Iterator[bytes]) -> Iterator[Raw]:
    yield from _read_table(chunks, None)


def _read_tsv(chunks: Iterator[bytes]) -> Iterator[Raw]:
    yield from _read_table(chunks, "\t")


class _TextLines:
    """Lines as text for the csv module, remembering what was wrong with those since the last row."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._lines = _lines(chunks)
        self.problem: Finding | None = None

    def __iter__(self) -> Iterator[str]:
        for _, line in self._lines:
            if line is None:
                self.problem = _too_long()
                yield "\n"
                continue
            text = _text(line)
            if isinstance(text, Finding):
                self.problem = text
                text = line.decode("utf-8", "replace")
            if "\0" in text:
                self.problem = Finding("nul", "This line holds a NUL character. Remove it.", value=shown(text, 80))
                text = text.replace("\0", "")
            yield text + "\n"


def _read_table(chunks: Iterator[bytes], delimiter: str | None) -> Iterator[Raw]:
    csv.field_size_limit(LONGEST_LINE_BYTES)
    lines = _TextLines(chunks)
    feed = iter(lines)
    head = next((line for line in feed if line.strip()), "")
    delimiter = delimiter or max(",;\t|", key=lambda mark: (head.count(mark), mark == ","))
    reader = csv.reader(_chain_text(head, feed), delimiter=delimiter, strict=True)
    header = _header(reader)
    while True:
        line = reader.line_num + 1
        lines.problem = None
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Raw(line, None, _csv_problem(error, line, reader.line_num))
            continue
        if lines.problem:
            yield Raw(line, None, lines.problem)
        elif len(cells) == len(header):
            yield Raw(line, dict(zip(header, cells, strict=True)))
        elif any(cell.strip() for cell in cells):
            yield Raw(line, None, _ragged(cells, header, delimiter))


def _chain_text(head: str, feed: Iterator[str]) -> Iterator[str]:
    yield head
    yield from feed


def _header(reader: Any) -> list[str]:
    try:
        names = [name.strip() for name in next(reader)]
    except (StopIteration, csv.Error) as error:
        raise BadData(
            f"The first line is not a header of column names ({error}).", way_out="Begin the file with one line of names.", param="file"
        ) from None
    names = [name or f"column_{index + 1}" for index, name in enumerate(names)]
    if len(names) > 10_000:
        raise BadData(
            f"The file has {len(names):,} columns.", way_out="Keep the ones to learn from; at most 10,000 are read.", param="file"
        )
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if twice is not None:
        raise BadData(f"Two columns are called “{shown(twice, 60)}”.", way_out="Give each column a name of its own.", param="file")
    return names


def _csv_problem(error: csv.Error, first: int, last: int) -> Finding:
    if "unexpected end" in str(error):
        return Finding("open_quote", f"A quote that opens in the row of line {first} is never closed. Double every quote inside a field.")
    if "field limit" in str(error) or "larger than field" in str(error):
        return Finding(
            "line_too_long",
            f"A field here is larger than {LONGEST_LINE_BYTES >> 20} MiB; a quote may never be closed. Double every quote inside a field.",
        )
    return Finding("bad_quotes", f"The quotes of line {last} cannot be read: {error}. Double every quote inside a field.")


def _ragged(cells: list[str], header: list[str], delimiter: str) -> Finding:
    mark = {"\t": "tab", ";": "semicolon", "|": "bar"}.get(delimiter, "comma")
    advice = f"Put quotes around a field that holds a {mark}." if len(cells) > len(header) else "A field is missing."
    return Finding(
        "ragged", f"This row has {len(cells)} fields and the header has {len(header)}. {advice}", value=shown(delimiter.join(cells), 120)
    )


def _read_parquet(path: Path, *, packed: bool) -> Iterator[Raw]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if packed:
        raise BadData("A Parquet file is compressed inside already.", way_out="Upload the .parquet file without .gz.", param="file")
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        if len(names) > 10_000:
            raise BadData(
                f"The file has {len(names):,} columns.", way_out="Keep the ones to learn from; at most 10,000 are read.", param="file"
            )
        number = 0
        for batch in file.iter_batches(batch_size=256, use_threads=False):
            for row in batch.to_pylist():
                number += 1
                yield Raw(number, {key: _plain_value(value) for key, value in row.items()})
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        if isinstance(error, pa.ArrowMemoryError):
            raise MemoryError from None
        raise BadData(
            f"The Parquet file cannot be read: {shown(str(error), 200)}.", way_out="Write it again, or convert it to .jsonl.", param="file"
        ) from None


def _plain_value(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, float) and value != value:
        return None
    if isinstance(value, dict):
        return {key: _plain_value(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_plain_value(item) for item in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


# Plain text ---------------------------------------------------------------------------------------------------------


def _read_txt(chunks: Iterator[bytes]) -> Iterator[Raw]:
    """Passages between blank lines, or single lines where the file has no blank line near its start."""
    head = next(chunks, b"")
    by_paragraph = re.search(rb"\n[ \t\r]*\n", head.strip()) is not None
    start, parts, held = 1, list[str](), 0
    for number, line in _lines(_chain(head, chunks)):
        text = _text(line) if line is not None else _too_long()
        if isinstance(text, str) and "\0" in text:
            text = Finding("nul", "This line holds a NUL character. Remove it.", value=shown(text, 80))
        if isinstance(text, Finding):
            yield Raw(number, None, text)
            continue
        if parts and (not text.strip() or not by_paragraph or held > LONGEST_PASSAGE):
            yield from _passages(start, "\n".join(parts))
            parts, held = [], 0
        if text.strip():
            if not parts:
                start = number
            parts.append(text.rstrip())
            held += len(text)
    if parts:
        yield from _passages(start, "\n".join(parts))


def _passages(line: int, text: str) -> Iterator[Raw]:
    """A passage, cut at the end of a sentence or a word where it is longer than LONGEST_PASSAGE."""
    at = 0
    while at < len(text):
        end = min(len(text), at + LONGEST_PASSAGE)
        if end < len(text):
            cuts = [text.rfind(mark, at + LONGEST_PASSAGE // 2, end) for mark in (". ", ".\n", "\n", " ")]
            end = next((cut + 1 for cut in cuts if cut > 0), end)
        piece = text[at:end].strip()
        if piece:
            yield Raw(line + text.count("\n", 0, at), {"text": piece})
        at = end


# Archives -----------------------------------------------------------------------------------------------------------


def _read_zip(path: Path) -> Iterator[Raw]:
    """The one data file of an archive. Nothing is ever unpacked to disk, so no name in it can lead anywhere."""
    try:
        with zipfile.ZipFile(path) as archive:
            member = _member(archive)
            inner = Path(member.filename.replace("\\", "/")).name
            limit = max(path.stat().st_size * LARGEST_RATIO, 64 << 20)
            if kind_of(inner) == "parquet":
                yield from _read_zipped_parquet(archive, member, limit)
                return
            with archive.open(member) as opened:
                yield from _read_stream(_Unpacked(opened, path.stat().st_size), kind_of(inner))  # type: ignore[arg-type]
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        what = "is locked with a password" if "password" in str(error) else f"cannot be read: {shown(str(error), 120)}"
        raise BadData(f"The zip file {what}.", way_out="Pack one data file again, without a password.", param="file") from None


def _member(archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    if len(archive.infolist()) > 10_000:
        raise BadData("The archive holds more than 10,000 files.", way_out="Pack one data file.", param="file")
    found = []
    for member in archive.infolist():
        name = member.filename.replace("\\", "/")
        hidden = any(part.startswith((".", "__MACOSX")) and part != ".." for part in name.split("/"))
        if member.is_dir() or hidden or Path(name.lower()).suffix not in EXTENSIONS or name.lower().endswith(".md"):
            continue
        found.append(member)
    if len(found) == 1:
        return found[0]
    names = ", ".join(shown(member.filename, 40) for member in found[:5])
    what = f"{len(found)} data files ({names})" if found else "no data file"
    raise BadData(f"The archive holds {what}.", way_out=f"Pack exactly one of {ACCEPTED.split(', and any')[0]}.", param="file")


def _read_zipped_parquet(archive: zipfile.ZipFile, member: zipfile.ZipInfo, limit: int) -> Iterator[Raw]:
    """Parquet is read from its end, so its bytes go to a temporary file first."""
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".parquet") as copy, archive.open(member) as opened:
        stream = _Unpacked(opened, limit // LARGEST_RATIO)  # type: ignore[arg-type]
        while data := stream.read(_CHUNK):
            copy.write(data)
        copy.flush()
        yield from _read_parquet(Path(copy.name), packed=False)


READERS: dict[str, Callable[[Iterator[bytes]], Iterator[Raw]]] = {
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": _read_csv,
    "tsv": _read_tsv,
    "txt": _read_txt,
}
