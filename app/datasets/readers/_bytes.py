"""From the bytes of a file to lines of UTF-8: decompression, byte order marks, other encodings, overlong lines."""

from __future__ import annotations

import codecs
import gzip
import io
from collections.abc import Iterator
from typing import IO, BinaryIO

from app.datasets.readers import _base
from app.datasets.readers._base import CHUNK_BYTES, MAX_RATIO, MAX_UNPACKED_BYTES, Raw
from app.errors import BadData
from app.formats._base import RowFinding, shown


class Unpacked(io.RawIOBase):
    """A decompressing stream with protection against zip bombs. `packed` is the file behind it: its position gives the progress."""

    def __init__(self, inner: BinaryIO | gzip.GzipFile, packed_bytes: int, packed: IO[bytes] | None = None) -> None:
        self.inner, self.packed = inner, packed
        self.limit = min(MAX_UNPACKED_BYTES, max(packed_bytes * MAX_RATIO, 64 << 20))
        self.count = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self.inner.read(CHUNK_BYTES if size < 0 else min(size, CHUNK_BYTES))
        self.count += len(data)
        early = self.packed is not None and self.count > max(64 << 20, self.packed.tell() * MAX_RATIO)
        if early or self.count > self.limit:
            raise BadData(
                f"The file unpacks to more than {min(self.count, self.limit):,} bytes, over {MAX_RATIO} times its size.",
                hint="This looks like an archive made to fill a disk. Upload the file unpacked.",
                param="file",
            )
        return data


def decode_marks(stream: BinaryIO) -> tuple[Iterator[bytes], list[Raw]]:
    """The file's bytes as UTF-8 chunks without a byte order mark, and notes about other encodings."""
    head = stream.read(CHUNK_BYTES)
    notes: list[Raw] = []
    if head.startswith(codecs.BOM_UTF8):
        head = head[3:]
        notes.append(Raw(1, None, RowFinding("bom", "The file begins with a byte order mark, which was skipped.", severity="note")))
    else:
        encoding = _utf_16_or_32(head)
        if encoding:
            text = f"The file is {encoding.upper()}, not UTF-8; it was converted."
            notes.append(Raw(1, None, RowFinding("utf_16", text, severity="note")))
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
        head = stream.read(CHUNK_BYTES)


def _converted(head: bytes, stream: BinaryIO, encoding: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)("strict")
    try:
        for chunk in _chunks(head, stream):
            yield decoder.decode(chunk).encode("utf-8", "surrogatepass")
        yield decoder.decode(b"", True).encode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise BadData(
            f"The file begins as {encoding.upper()} but is broken: {error.reason}.",
            hint="Save it as UTF-8 and upload it again.",
            param="file",
        ) from None


def lines_of(chunks: Iterator[bytes]) -> Iterator[tuple[int, bytes | None]]:
    """(number, line without its end), or (number, None) for a line too long to be held."""
    number, rest, too_long = 1, b"", False
    parts: list[bytes] = []
    held = 0
    for chunk in chunks:
        if not held and not too_long and chunk.isspace() and (blank := chunk.count(b"\n")) > 1:
            yield number, b""  # stands for all of them, which may be a million
            number, parts = number + blank, []
            continue
        first, *others = chunk.split(b"\n")
        parts.append(first)
        held += len(first)
        if held > _base.MAX_LINE_BYTES:
            too_long, parts, held = True, [], 0
        for other in others:
            yield number, None if too_long else b"".join(parts).removesuffix(b"\r")
            number, too_long, parts, held = number + 1, False, [other], len(other)
    rest = b"".join(parts).removesuffix(b"\r")
    if rest or too_long:
        yield number, None if too_long else rest


def text_of_line(line: bytes) -> str | RowFinding:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        before = line[max(0, error.start - 20) : error.start + 20].decode("cp1252", "replace")
        return RowFinding(
            "not_utf8",
            f"Byte {error.start + 1} of this line is not UTF-8. If the file is from Windows, its encoding may be cp1252. Save it as UTF-8.",
            value=shown(before),
        )


def too_long(what: str = "line") -> RowFinding:
    return RowFinding(
        "line_too_long",
        f"This {what} is longer than {_base.MAX_LINE_BYTES >> 20} MiB and was skipped. Write one row per line, or split this row.",
    )


def chain(head: bytes, chunks: Iterator[bytes]) -> Iterator[bytes]:
    yield head
    yield from chunks
