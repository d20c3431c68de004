"""Excel workbooks: the rows of the first sheet that has any, with values as Excel last computed them."""

from __future__ import annotations

import math
import warnings
import zipfile
from collections.abc import Iterator
from datetime import date, datetime, time
from itertools import chain, islice
from pathlib import Path
from typing import Any

from app.datasets.readers import _base
from app.datasets.readers._base import Raw
from app.datasets.readers._tables import as_json, check_names
from app.errors import BadData
from app.formats._base import RowFinding, shown
from app.kit.json_safe import storable

MAX_ROWS = 1 << 20
"""Excel's own limit; a larger row number can only be meant to exhaust memory."""
HEAD_ROWS = 10
_ERRORS = {"#N/A", "#REF!", "#VALUE!", "#DIV/0!", "#NAME?", "#NULL!", "#NUM!"}
_OLE = b"\xd0\xcf\x11\xe0"
"""The signature of old .xls files and of workbooks with a password."""
Filled = tuple[int, list[Any]]
"""Row number in the sheet, and its values without empty ones at the end."""


def read_xlsx(path: Path) -> Iterator[Raw]:
    """Rows by their number in the sheet. The first row with names is the header; a title above it is skipped."""
    import openpyxl

    try:
        _check_archive(path)
        with path.open("rb") as opened, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            book = openpyxl.load_workbook(opened, read_only=True, data_only=True, keep_links=False)
            sheets = [sheet for sheet in book.worksheets if sheet.sheet_state == "visible"] or book.worksheets
            filled = [(sheet, first) for sheet in sheets if (first := next(_rows(sheet), None)) is not None]
            if not filled:
                raise BadData("The workbook has no rows.", hint="Upload one with a header and at least one row.", param="file")
            if len(filled) > 1:
                yield Raw(1, None, _other_sheets([sheet.title for sheet, _ in filled]))
            yield from _table(_rows(filled[0][0]))
    except (BadData, MemoryError):
        raise
    except zipfile.BadZipFile:
        raise _broken("The file is not a whole Excel workbook: it is damaged or cut off.", "Save it again as .xlsx, or as .csv.") from None
    except Exception as error:  # whatever the library raises is due to the file
        raise _broken(f"The Excel file cannot be read: {shown(str(error), 200)}.", "Save it again as .xlsx, or as .csv.") from None


def _broken(message: str, hint: str) -> BadData:
    return BadData(message, hint=hint, param="file")


def _check_archive(path: Path) -> None:
    """Raises BadData for what is no plain .xlsx, before anything in it is unpacked."""
    with path.open("rb") as opened:
        if opened.read(4) == _OLE:
            raise _broken("The Excel file is protected by a password, or is an old .xls.", "Save it as .xlsx without a password.")
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    names = {member.filename.lower() for member in members}
    if "[content_types].xml" not in names or not any(name.startswith("xl/") for name in names):
        raise _broken(
            "The file is not an Excel workbook, although it is called .xlsx.", "Save it as .xlsx, or upload it under its own name."
        )
    if any(name.endswith(("vbaproject.bin", "workbook.bin")) for name in names):
        raise _broken(
            "The workbook holds macros or is in Excel's binary format.", "Save it as .xlsx (Excel Workbook), which has no macros."
        )
    unpacked, limit = sum(member.file_size for member in members), max(path.stat().st_size * _base.MAX_RATIO, 64 << 20)
    if unpacked > limit:
        text = f"The file unpacks to {unpacked:,} bytes, over {_base.MAX_RATIO} times its size."
        raise _broken(text, "This looks like a file made to fill a machine. Upload the rows as .csv.")


def _other_sheets(titles: list[str]) -> RowFinding:
    others = ", ".join(f"“{shown(title, 40)}”" for title in titles[1:6]) + (", …" if len(titles) > 6 else "")
    text = f"Only the sheet “{shown(titles[0], 40)}” was read, not {others}. To use another, move it to the front or save it as a file."
    return RowFinding("other_sheets", text, severity="note")


def _rows(sheet: Any) -> Iterator[Filled]:
    """The non-empty rows of a sheet."""
    sheet.reset_dimensions()  # the size that a file claims need not be true
    for number, cells in enumerate(sheet.iter_rows(values_only=True), 1):
        if number > MAX_ROWS:
            raise _broken(f"A row has a number above {MAX_ROWS:,}, Excel's own limit.", "Save it again as .xlsx, or as .csv.")
        values = [_plain(value) for value in cells]
        while values and values[-1] is None:
            values.pop()
        if values:
            yield number, values


def _plain(value: Any) -> Any:
    """A value as JSON: dates as ISO 8601, integers without a fraction, null for a formula that failed."""
    if isinstance(value, str):
        text = storable(value.replace("_x000D_", ""))
        return None if text in _ERRORS or not text.strip() else text
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return int(value) if value.is_integer() and abs(value) < 1e15 else value
    if isinstance(value, datetime):
        return (value.date() if value.time() == time() else value).isoformat()
    if isinstance(value, date | time):
        return value.isoformat()
    return value if value is None or isinstance(value, bool | int) else str(value)


def _table(rows: Iterator[Filled]) -> Iterator[Raw]:
    head = list(islice(rows, HEAD_ROWS))
    start = _header_of(head)
    if start:
        text = f"The rows above the column names in row {head[start][0]} were skipped."
        yield Raw(head[0][0], None, RowFinding("title_rows", text, severity="note"))
    names = [str(name).strip() if name is not None else f"column_{n}" for n, name in enumerate(head[start][1], 1)]
    check_names(names)
    for number, values in chain(head[start + 1 :], rows):
        if len(values) > len(names):
            text = f"This row has {len(values)} cells and the header has {len(names)}. Name the other columns, or clear their cells."
            problem = RowFinding("ragged", text, value=shown(values[-1], 120))
            yield Raw(number, None, problem, None, as_json(["" if value is None else value for value in values], names))
        else:
            yield Raw(number, dict(zip(names, values + [None] * (len(names) - len(values)), strict=True)))


def _header_of(head: list[Filled]) -> int:
    """Index of the header among the first rows: the first, or the first of several cells where most rows have several."""
    several = [sum(value is not None for value in values) > 1 for _, values in head]
    return several.index(True) if not several[0] and sum(several) * 2 > len(several) else 0
