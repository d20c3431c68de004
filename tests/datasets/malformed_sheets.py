"""Malformed Excel workbooks, for the corpus of `tests/datasets/malformed.py`."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Iterator

ROWS = [["text", "label"], *([f"How long does the varnish number {n} dry?", ("repair", "delivery")[n % 2]] for n in range(12))]
SHEET = "xl/worksheets/sheet1.xml"


def workbook(*sheets: list[list[object]]) -> bytes:
    """An Excel file with these sheets, each a list of rows."""
    import openpyxl

    book, out = openpyxl.Workbook(), io.BytesIO()
    book.remove(book.active)
    for number, rows in enumerate(sheets, 1):
        sheet = book.create_sheet(f"Sheet {number}")
        for row in rows:
            sheet.append(row)
    book.save(out)
    return out.getvalue()


def repacked(data: bytes, change: dict[str, bytes | None]) -> bytes:
    """The archive with some members changed or added, or taken out for None."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        members = {name: old.read(name) for name in old.namelist()} | change
        for name, content in members.items():
            if content is not None:
                new.writestr(name, content)
    return out.getvalue()


def with_xml(data: bytes, old: bytes, new: bytes, member: str = SHEET) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        content = archive.read(member)
    assert old in content
    return repacked(data, {member: content.replace(old, new, 1)})


INLINE, SHARED = b'<c r="B2" t="inlineStr"><is><t>repair</t></is></c>', b'<c r="B2" t="s"><v>0</v></c>'


def with_shared(text: bytes = b"repair", cell: bytes = SHARED) -> bytes:
    """A good workbook whose first label stands in the table of shared texts, as Excel itself writes them."""
    kind = b"application/vnd.openxmlformats-officedocument.spreadsheetml.sharedStrings+xml"
    data = with_xml(workbook(ROWS), INLINE, cell)
    told = b'<Override PartName="/xl/sharedStrings.xml" ContentType="' + kind + b'"/></Types>'
    data = with_xml(data, b"</Types>", told, "[Content_Types].xml")
    table = b'<sst xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"><si><t>' + text + b"</t></si></sst>"
    return repacked(data, {"xl/sharedStrings.xml": table})


def sheets() -> Iterator[tuple[str, bytes, str, int | None]]:
    """Name, bytes, what must be said, and the line where it matters: the number of a row in its sheet."""
    good = workbook(ROWS)
    laughs = b'<!DOCTYPE l [<!ENTITY a "lol">' + b"".join(
        f'<!ENTITY {new} "{f"&{old};" * 20}">'.encode() for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    )
    yield "a good one / x.xlsx", good, "good", None
    yield "words / x.xlsx", b"this is not Excel", "error", 1
    yield "cut off / x.xlsx", good[: len(good) // 2], "error", 1
    yield "no end / x.xlsx", good[:-22], "error", 1
    yield "a password / x.xlsx", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(4096), "error", 1
    yield "macros / x.xlsx", repacked(good, {"xl/vbaProject.bin": b"\0" * 64}), "error", 1
    yield "a Word document / x.xlsx", repacked(good, {"xl/workbook.xml": None, SHEET: None, "word/document.xml": b"<w/>"}), "error", 1
    yield "an archive of anything / x.xlsx", repacked(workbook(ROWS), {"[Content_Types].xml": None}), "error", 1
    yield "no sheet / x.xlsx", repacked(good, {SHEET: None}), "error", 1
    yield "empty sheets / x.xlsx", workbook([], []), "error", 1
    yield "only names / x.xlsx", workbook(ROWS[:1]), "error", 1
    yield "two columns of one name / x.xlsx", workbook([["text", "text"], ["a", "b"]]), "error", 1
    yield "broken XML / x.xlsx", with_xml(good, b"</row>", b"</wor>"), "error", 1
    yield "a shared text / x.xlsx", with_shared(), "good", None
    yield "a text that is not there / x.xlsx", with_shared(cell=SHARED.replace(b"0", b"99999")), "error", None
    yield "a million laughs / x.xlsx", with_xml(with_shared(b"&i;"), b"<sst", laughs + b"]><sst", "xl/sharedStrings.xml"), "error", 1
    yield "a row number without end / x.xlsx", with_xml(good, b'<row r="13"', b'<row r="99999999999"'), "error", 13
    yield "a cell far to the right / x.xlsx", with_xml(good, b'r="B5"', b'r="XFD5"'), "ragged", 5
    yield "a bomb of 256 MB / x.xlsx", repacked(good, {"xl/media/image1.png": bytes(256 << 20)}), "error", 1
    yield "a formula that failed / x.xlsx", workbook([*ROWS, ["#REF!", "repair"]]), "empty", 14
    yield "a formula that was never computed / x.xlsx", workbook([*ROWS, ["=A1", "repair"]]), "empty", 14
    yield "a cell too many / x.xlsx", workbook([*ROWS, ["a", "b", "c"]]), "ragged", 14
    yield "a title above the table / x.xlsx", workbook([["Tickets"], [], *ROWS]), "title_rows", 1
    yield "two sheets / x.xlsx", workbook([], ROWS, ROWS), "other_sheets", 1
    yield "a wrong size / x.xlsx", _lying(good), "error", None
    yield "nothing at all / x.xlsx", b"", "refused", None


def _lying(data: bytes) -> bytes:
    """A directory that says 10 bytes for every member."""
    changed, at = bytearray(data), -1
    while (at := changed.find(b"PK\x01\x02", at + 1)) >= 0:
        changed[at + 24 : at + 28] = struct.pack("<I", 10)
    return bytes(changed)
