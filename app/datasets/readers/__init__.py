"""Streaming readers: the rows of a file one by one, in bounded memory, each with its line number, or the problem there.

A reader never raises because of one line: it yields a `Raw` with a problem and continues. What makes the whole file unreadable is
a `Raw` without a row at the line where it shows. File types are recognized by extension; `.gz` and `.zip` are unpacked on the
way.
"""

from __future__ import annotations

import gzip
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from app.datasets.readers._base import CHUNK_BYTES, Raw
from app.datasets.readers._bytes import Unpacked, decode_marks
from app.datasets.readers._json import parse_json, read_json, read_jsonl
from app.datasets.readers._passages import read_txt
from app.datasets.readers._sheets import read_xlsx
from app.datasets.readers._tables import read_csv, read_parquet, read_tsv
from app.errors import BadData, Unsupported
from app.formats._base import RowFinding, shown

__all__ = ["ACCEPTED", "Raw", "kind_of", "parse_json", "read"]

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
    ".xlsx": "xlsx",
}
ACCEPTED = ".jsonl, .json, .csv, .tsv, .xlsx, .txt and .parquet, and any of these as .gz or .zip"
READERS: dict[str, Callable[[Iterator[bytes]], Iterator[Raw]]] = {
    "jsonl": read_jsonl,
    "json": read_json,
    "csv": read_csv,
    "tsv": read_tsv,
    "txt": read_txt,
}
WHOLE: dict[str, Callable[[Path], Iterator[Raw]]] = {"parquet": read_parquet, "xlsx": read_xlsx}
"""Types that are read from their end, so their bytes must be in a file."""


def kind_of(filename: str) -> str:
    """jsonl, json, csv, tsv, txt, parquet or xlsx. Raises Unsupported for an unsupported extension."""
    path = Path(filename.lower())
    suffixes = path.suffixes
    if suffixes and suffixes[-1] == ".zip":
        return "zip"
    if suffixes and suffixes[-1] == ".gz":
        suffixes = suffixes[:-1]
    kind = EXTENSIONS.get(suffixes[-1]) if suffixes else None
    if kind is None:
        raise Unsupported(
            f"File type not supported: “{shown(filename, 80)}”.",
            hint=f"Save it as one of {ACCEPTED}.",
            param="file",
        )
    return kind


def read(path: Path, filename: str) -> Iterator[Raw]:
    """The rows of a file, parsed by its extension. Raises BadData when it is empty or cannot be opened as that type at all."""
    kind = kind_of(filename)
    if path.stat().st_size == 0:
        raise BadData("The file is empty.", hint="Upload a file with at least one row.", param="file")
    if kind == "zip":
        yield from read_zip(path)
        return
    packed = filename.lower().endswith(".gz")
    if kind in WHOLE and not packed:
        yield from WHOLE[kind](path)
        return
    with path.open("rb") as opened:
        stream: BinaryIO = Unpacked(gzip.GzipFile(fileobj=opened), path.stat().st_size, opened) if packed else opened  # type: ignore[assignment]
        try:
            yield from read_stream(stream, kind)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise BadData(f"The gzip file is broken: {error}.", hint="Pack it again, or upload it unpacked.", param="file") from None


def read_stream(stream: BinaryIO, kind: str) -> Iterator[Raw]:
    if kind in WHOLE:
        yield from _read_unpacked(stream, kind)
        return
    chunks, notes = decode_marks(stream)
    yield from notes
    yield from READERS[kind](chunks)


# Archives -----------------------------------------------------------------------------------------------------------


def read_zip(path: Path) -> Iterator[Raw]:
    """The data files of an archive, in sequence. Only Parquet and Excel are unpacked to disk, to a file with a name of our own,
    so a name in the archive cannot lead anywhere."""
    try:
        with zipfile.ZipFile(path) as archive:
            members, last = _members(archive), 0
            for member in members:
                if len(members) > 1:
                    text = f"“{shown(member.filename, 80)}” begins here: the {len(members)} files of the archive are read as one."
                    yield Raw(last + 1, None, RowFinding("several_files", text, severity="note"))
                before = last
                with archive.open(member) as opened:
                    stream = Unpacked(opened, path.stat().st_size, archive.fp)  # type: ignore[arg-type]
                    for raw in read_stream(stream, kind_of(_plain_name(member))):  # type: ignore[arg-type]
                        last = max(last, before + raw.line)
                        yield raw._replace(line=before + raw.line)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        what = "is locked with a password" if "password" in str(error) else f"cannot be read: {shown(str(error), 120)}"
        raise BadData(f"The zip file {what}.", hint="Pack the data again, without a password.", param="file") from None


def _plain_name(member: zipfile.ZipInfo) -> str:
    return Path(member.filename.replace("\\", "/")).name


def _members(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """The data files in the order of their names. Raises BadData where there are none, or of several types."""
    if len(archive.infolist()) > 10_000:
        raise BadData("The archive holds more than 10,000 files.", hint="Pack the data files alone.", param="file")
    found = []
    for member in archive.infolist():
        name = member.filename.replace("\\", "/")
        hidden = any(part.startswith((".", "__MACOSX")) and part != ".." for part in name.split("/"))
        if member.is_dir() or hidden or Path(name.lower()).suffix not in EXTENSIONS or name.lower().endswith(".md"):
            continue
        found.append(member)
    found = [member for member in found if Path(_plain_name(member)).stem.lower() not in _ABOUT] or found
    if found and len({kind_of(_plain_name(member)) for member in found}) == 1:
        return sorted(found, key=lambda member: member.filename)
    names = ", ".join(shown(member.filename, 40) for member in found[:5]) + (", …" if len(found) > 5 else "")
    what = f"{len(found)} data files of several kinds ({names})" if found else "no data file"
    hint = f"Pack one of {ACCEPTED.split(', and any')[0]}, or several of one of these kinds, which are read as one."
    raise BadData(f"The archive holds {what}.", hint=hint, param="file")


_ABOUT = ("readme", "license", "licence", "changelog", "notice")


def _read_unpacked(stream: BinaryIO, kind: str) -> Iterator[Raw]:
    with tempfile.NamedTemporaryFile() as copy:
        while data := stream.read(CHUNK_BYTES):
            copy.write(data)
        copy.flush()
        yield from WHOLE[kind](Path(copy.name))
