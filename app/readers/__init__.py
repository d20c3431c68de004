"""Streaming readers: the rows of a file one by one, in bounded memory, each with its line, or what is wrong there.

A reader never raises for what one line holds: it gives a `Raw` with a problem and goes on. What makes the whole file
unreadable is a `Raw` without a row at the line where it shows. Files are told apart by their extension; `.gz` and
`.zip` are opened on the way.
"""

from __future__ import annotations

import gzip
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from app.errors import BadData, Unsupported
from app.formats._base import shown
from app.readers._base import CHUNK_BYTES, LARGEST_RATIO, Raw
from app.readers._bytes import Unpacked, decode_marks
from app.readers._json import read_json, read_jsonl
from app.readers._passages import read_txt
from app.readers._tables import read_csv, read_parquet, read_tsv

__all__ = ["ACCEPTED", "Raw", "kind_of", "read"]

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
ACCEPTED = ".jsonl, .json, .csv, .tsv, .txt and .parquet, and any of these as .gz or .zip"
READERS: dict[str, Callable[[Iterator[bytes]], Iterator[Raw]]] = {
    "jsonl": read_jsonl,
    "json": read_json,
    "csv": read_csv,
    "tsv": read_tsv,
    "txt": read_txt,
}


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
        yield from read_zip(path)
        return
    if kind == "parquet":
        yield from read_parquet(path, packed=filename.lower().endswith(".gz"))
        return
    with path.open("rb") as opened:
        packed = filename.lower().endswith(".gz")
        stream: BinaryIO = Unpacked(gzip.GzipFile(fileobj=opened), path.stat().st_size, opened) if packed else opened  # type: ignore[assignment]
        try:
            yield from read_stream(stream, kind)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise BadData(f"The gzip file is broken: {error}.", way_out="Pack it again, or upload it unpacked.", param="file") from None


def read_stream(stream: BinaryIO, kind: str) -> Iterator[Raw]:
    chunks, notes = decode_marks(stream)
    yield from notes
    yield from READERS[kind](chunks)


# Archives -----------------------------------------------------------------------------------------------------------


def read_zip(path: Path) -> Iterator[Raw]:
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
                yield from read_stream(Unpacked(opened, path.stat().st_size, archive.fp), kind_of(inner))  # type: ignore[arg-type]
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
    with tempfile.NamedTemporaryFile(suffix=".parquet") as copy, archive.open(member) as opened:
        stream = Unpacked(opened, limit // LARGEST_RATIO)  # type: ignore[arg-type]
        while data := stream.read(CHUNK_BYTES):
            copy.write(data)
        copy.flush()
        yield from read_parquet(Path(copy.name), packed=False)
