"""JSON Lines, JSON arrays and concatenated JSON objects: rows one by one; a broken one does not affect others."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from app.datasets.readers import _base
from app.datasets.readers._base import Raw
from app.datasets.readers._bytes import chain, lines_of, text_of_line, too_long
from app.datasets.readers._repair import LABELS, offer, repaired, windows_text
from app.errors import BadData
from app.formats._base import Row, RowFinding, shown
from app.kit.json_safe import DEEPEST, too_deep


class _Odd(ValueError):
    """JSON that Python's parser accepts and that must be refused."""

    def __init__(self, finding: RowFinding) -> None:
        super().__init__(finding.message)
        self.finding = finding


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Odd(
                    RowFinding("duplicate_key", f"The key “{shown(key, 60)}” stands twice in one object. Keep one of them.", shown(key, 60))
                )
            seen.add(key)
    return result


def _constant(name: str) -> Any:
    raise _Odd(RowFinding("not_a_number", f"{name} is not JSON. Write null or a number.", value=name))


def _float(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        text = f"{shown(digits, 40)} is larger than a number can be here. Write null, a smaller number, or a text."
        raise _Odd(RowFinding("not_a_number", text, value=shown(digits, 60)))
    return number


_decoder = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_constant, parse_float=_float)
_surrogates = re.compile("[\ud800-\udfff]")


def parse_json(text: str) -> Row | RowFinding:
    """One row from its JSON text, or the problem."""
    try:
        value = _decoder.decode(text)
    except _Odd as odd:
        return odd.finding
    except RecursionError:
        return _too_deep(text)
    except json.JSONDecodeError as error:
        return RowFinding(
            "invalid_json",
            f"Not valid JSON: {error.msg.removesuffix(' at')} at character {error.pos + 1}. {_hint(text, error)}".strip(),
            value=shown(text, 120),
        )
    except ValueError:
        message = "A number here has more than 4,300 digits. Write it as a text, in double quotes."
        return RowFinding("invalid_json", message, value=shown(text, 60))
    if not isinstance(value, dict):
        kind = {list: "a list", str: "a text", bool: "a truth value", type(None): "null"}.get(type(value), "a number")
        message = f"A row must be an object, and this is {kind}. Name its columns, as in {{“prompt”: …, “completion”: …}}."
        return RowFinding("wrong_shape", message, value=shown(value, 120))
    if text.count("[") + text.count("{") > DEEPEST and too_deep(value):
        return _too_deep(text)
    if "\\u" in text and (found := _unwritable(value)):
        return found
    return value


def _too_deep(text: str) -> RowFinding:
    return RowFinding("too_deep", f"This JSON is nested deeper than {DEEPEST} levels. Flatten it.", value=shown(text, 60))


def _hint(text: str, error: json.JSONDecodeError) -> str:
    stripped = text.strip()
    if error.msg.startswith("Extra data"):
        return "Two rows may be on one line: write each on a line of its own."
    if stripped in ("{", "[") or (stripped.startswith("{") and error.pos >= len(text.rstrip())):
        return "The object does not end on this line: in a .jsonl file every row is on one line; name a pretty-printed file .json."
    if stripped.startswith("{'") or "': '" in stripped:
        return "JSON needs double quotes, as Python's json.dumps writes them."
    if re.search(r",\s*[}\]]", text[max(0, error.pos - 20) : error.pos + 2]):
        return "Take away the comma before the closing bracket."
    if "control character" in error.msg:
        return "Write line breaks as \\n and tabs as \\t inside a text, and remove other control characters."
    if "escape" in error.msg:
        return 'After a backslash JSON knows only " \\ / b f n r t and u with four digits; write a backslash itself twice.'
    if "Unterminated string" in error.msg:
        return "A text is never closed: end it with a double quote, or write the row whole where it was cut off."
    if "property name" in error.msg:
        return "Put double quotes around every key."
    if "delimiter" in error.msg:
        return "Put a colon between a key and its value, and a comma between two pairs."
    if found := re.match(r"None|True|False|undefined|'", text[error.pos :]):
        return f"JSON writes null, true and false, and texts in double quotes, where this has {found.group()}."
    if text[:1] in ("<", "\ufeff"):
        return "This is no JSON: it may be a page of HTML or begin with a byte order mark. Save the data itself."
    return "Each line must be one object in braces, as Python's json.dumps writes it."


def _unwritable(value: Any) -> RowFinding | None:
    """A lone surrogate anywhere, or a NUL in a key. A NUL in a text is a finding of the report, which can remove it. The path is
    built while the recursion returns: a path for every member of a deep row would take far more memory than the row."""
    if isinstance(value, str):
        half = _surrogates.search(value)
        return half and RowFinding(
            "lone_surrogate",
            f"The text holds half of a character (\\u{ord(half.group()):04x}), as is left when an emoji is cut in two. Write the whole character.",
            None,
            shown(value),
        )
    if isinstance(value, list):
        return next((_inside(f"[{index}]", found) for index, item in enumerate(value) if (found := _unwritable(item))), None)
    if not isinstance(value, dict):
        return None
    if nul := next((key for key in value if "\0" in key), None):
        text = f"The key “{shown(nul, 60)}” holds a NUL character, which no database can store. Remove it."
        return RowFinding("nul", text, None, shown(nul, 60))
    inner = next((_inside(shown(key, 60), found) for key, item in value.items() if (found := _unwritable(item))), None)
    return inner or next((found for key in value if (found := _unwritable(key))), None)


def _inside(step: str, found: RowFinding) -> RowFinding:
    """A finding inside a key, or inside an index in brackets."""
    rest = found.column or ""
    return found._replace(column=f"{step}.{rest}" if rest and not rest.startswith("[") else f"{step}{rest}")


def _row(line: int, data: bytes) -> Raw:
    text = text_of_line(data)
    row = text if isinstance(text, RowFinding) else parse_json(text)
    if not isinstance(row, RowFinding):
        return Raw(line, row)
    meant = windows_text(data) if isinstance(text, RowFinding) else text
    whole = repaired(meant) if meant is not None and row.rule in LABELS else None
    return Raw(line, None, offer(row, whole), whole, data.decode("utf-8", "backslashreplace"))


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


def read_jsonl(chunks: Iterator[bytes]) -> Iterator[Raw]:
    first, chunks = _peek(chunks)
    if first == b"[":
        yield Raw(1, None, RowFinding("json_array", "The file holds one JSON list, so it was read as .json.", severity="note"))
        yield from _elements(chunks)
        return
    for number, line in lines_of(chunks):
        if line is None:
            yield Raw(number, None, too_long())
        elif line.strip():
            yield _row(number, line)


_WRAPPED = re.compile(rb'\s*\{\s*"(?:data|rows|train|examples|items|records|dataset)"\s*:\s*(?=\[)')


def read_json(chunks: Iterator[bytes]) -> Iterator[Raw]:
    first, chunks = _peek(chunks)
    if first == b"[":
        yield from _elements(chunks)
        return
    if first != b"{":
        yield from read_jsonl(chunks)
        return
    head = next(chunks)
    wrapped = _WRAPPED.match(head)
    if wrapped:  # {"data": [row, row, …]}
        yield from _elements(chain(head[wrapped.end() :], chunks))
    else:  # concatenated objects, one per line or pretty-printed
        cutter = _Cutter(array=False)
        for chunk in chain(head, chunks):
            yield from (_cut_row(*item) for item in cutter.feed(chunk))
        yield from (_cut_row(*item) for item in cutter.emit())


def _elements(chunks: Iterator[bytes]) -> Iterator[Raw]:
    cutter = _Cutter(array=True)
    for chunk in chunks:
        yield from (_cut_row(*item) for item in cutter.feed(chunk))
        if cutter.done:
            return
    yield from (_cut_row(*item) for item in cutter.emit())
    text = "The list does not end with “]”: the file may have been cut off. The rows before this line were read."
    yield Raw(cutter.line, None, RowFinding("invalid_json", text))


def _cut_row(line: int, data: bytes | None) -> Raw:
    return Raw(line, None, too_long("element")) if data is None else _row(line, data)


_STRUCTURE = re.compile(rb'["{}\[\],]')
_BACKSLASH = ord("\\")
_MAX_OPEN = 1_000_000
"""Maximum open brackets while a file is split into its rows."""


class _Cutter:
    """Splits a JSON array, or concatenated objects, into pieces by their brackets alone.

    Each piece is parsed by itself afterwards, so a broken one does not affect others, and depth costs only a counter.
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
        quote = -1  # position of the next double quote, searched for once however many backslashes precede it
        while True:
            if self._escaped and at < len(chunk):
                self._escaped, at = False, at + 1
            if self._in_text and not self._escaped:
                if quote < at:
                    found = chunk.find(b'"', at)
                    quote = found if found >= 0 else len(chunk)
                backslash = chunk.find(b"\\", at, quote)
                at = backslash if backslash >= 0 else quote
                if at == len(chunk):
                    self._take(chunk[taken:])
                    return
                self._escaped = self._in_text = chunk[at] == _BACKSLASH
                at += 1
                continue
            match = None if self._escaped else _STRUCTURE.search(chunk, at)
            if match is None:
                self._take(chunk[taken:])
                return
            token, at = match.group(), match.end()
            if token == b'"':
                self._in_text = True
            elif token in b"{[":
                self._depth += 1
                if self._depth > _MAX_OPEN:
                    raise self._too_deep()
                if self.array and self._depth == 1:  # the bracket of the array itself
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

    def _too_deep(self) -> BadData:
        error = BadData(
            f"The JSON is nested more than {_MAX_OPEN:,} levels deep: brackets are opened and never closed.",
            hint="Close them, or write one row on each line as .jsonl.",
            param="file",
        )
        error.details = {"line": self._start_line if self._buffer or self._too_long else self.line}
        return error

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
        if len(self._buffer) > _base.MAX_LINE_BYTES:
            self._too_long, self._buffer = True, bytearray()
