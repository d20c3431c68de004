"""The rows of a dataset on disk: a Parquet file with `line` (int64) and `row` (JSON), and a hash of its contents."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from app.errors import BadData
from app.kit.humanize import human_number
from app.languages import gettext, mark

if TYPE_CHECKING:
    import pyarrow.parquet as pq

BATCH_ROWS, BATCH_BYTES = 2000, 4 << 20
READ_AGAIN = mark("Read the dataset again: on its page under “Change format or columns”, or with POST /v1/datasets/{id}/retry.")


class RowsFile:
    """Writes the rows of a dataset. `sha256` is over `line`, tab, `row`, newline of each, so it identifies the content whatever
    version of Arrow writes it. Pages have checksums, so that reading one row of many detects damage."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._pa = pa
        columns: list[tuple[str, pa.DataType]] = [("line", pa.int64()), ("row", pa.string())]
        self._schema = pa.schema(columns)
        self._writer = pq.ParquetWriter(path, self._schema, compression="zstd", use_dictionary=False, write_page_checksum=True)
        self._lines: list[int] = []
        self._rows: list[str] = []
        self._bytes = 0
        self._hash = hashlib.sha256()
        self.sha256 = ""

    def __enter__(self) -> RowsFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._flush()
            self.sha256 = self._hash.hexdigest()
        self._writer.close()

    def add(self, line: int, row: str) -> None:
        self._lines.append(line)
        self._rows.append(row)
        self._bytes += len(row)
        self._hash.update(_hashed(line, row))
        if len(self._rows) >= BATCH_ROWS or self._bytes >= BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_batch(self._pa.record_batch([self._lines, self._rows], schema=self._schema))
        self._lines, self._rows, self._bytes = [], [], 0


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    """Write rows that need no parsing, on lines counted from 1; returns their hash."""
    with RowsFile(path) as file:
        for line, row in enumerate(rows, 1):
            file.add(line, json.dumps(row, ensure_ascii=False))
    return file.sha256


def read_rows(path: Path, name: str = "") -> Iterator[tuple[int, str]]:
    """(line, row as JSON) of a rows file, in its order. Raises BadData where the file is missing or cannot be read."""
    line = 0
    with _opened(path, name, lambda: gettext("behind line %(line)s", line=line)) as file:
        for batch in file.iter_batches(batch_size=1000, columns=["line", "row"], use_threads=False):
            lines, texts = cast("list[int]", batch["line"].to_pylist()), cast("list[str]", batch["row"].to_pylist())
            for line, row in zip(lines, texts, strict=True):
                yield line, row


def row_at(path: Path, place: int, name: str = "") -> str:
    """The row at an index, counted from 0, as JSON; only the row group that contains it is read. Raises BadData as `read_rows`."""
    with _opened(path, name, lambda: gettext("near row %(row)s", row=human_number(place + 1))) as file:
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if place < count:
                row: str = file.read_row_group(group, columns=["row"], use_threads=False)["row"][place].as_py()
                return row
            place -= count
    raise _damaged(name, gettext("it has fewer rows than were written"))


@contextlib.contextmanager
def _opened(path: Path, name: str, where: Callable[[], str]) -> Iterator[pq.ParquetFile]:
    """The file, with Arrow's errors about a damaged one put into words."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        said = gettext("The rows of dataset %(name)s are gone.", name=name) if name else gettext("The rows of the dataset are gone.")
        raise BadData(said, hint=gettext(READ_AGAIN), code="bad_data")
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            yield file
    except pa.ArrowMemoryError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise _damaged(name, f"{where()}: {' '.join(str(error).split())[:200]}") from None


def verify_rows(path: Path, sha256: str, name: str = "") -> None:
    """Check a rows file against `Dataset.rows_sha256`. Raises BadData that names the damage.

    A file that was intact is not read again in this process while its size, time and inode stay the same.
    """
    stamp = _stamp(path)
    if stamp is not None and _whole.get(path) == (stamp, sha256):
        return
    digest, rows = hashlib.sha256(), 0
    for line, row in read_rows(path, name):
        digest.update(_hashed(line, row))
        rows += 1
    if digest.hexdigest() != sha256:
        how = gettext(
            "its %(rows)s rows have the SHA-256 %(found)s…, and %(written)s… was written",
            rows=human_number(rows),
            found=digest.hexdigest()[:12],
            written=sha256[:12],
        )
        raise _damaged(name, how)
    if stamp is not None:
        _whole[path] = (stamp, sha256)


_whole: dict[Path, tuple[tuple[int, int, int], str]] = {}


def _hashed(line: int, row: str) -> bytes:
    return f"{line}\t{row}\n".encode()


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino


def _damaged(name: str, how: str) -> BadData:
    if name:
        said = gettext("The rows file of dataset %(name)s is damaged: %(how)s.", name=name, how=how)
    else:
        said = gettext("The rows file of the dataset is damaged: %(how)s.", how=how)
    return BadData(said, hint=gettext(READ_AGAIN), code="bad_data")
