"""A corpus of malformed datasets, and what the studio says of each: `python -m tests.datasets.malformed --table`.

Every file is made here, from a line or two that say what is wrong with it. The command starts a web process of its own,
uploads each file over HTTP, has it read by the data worker's limited child, and prints what came of it: refused at the
upload, an error of the whole file, or findings; with the line, the seconds and the child's largest memory. Files of a
gigabyte are made for the command alone (`--giants`); `tests/datasets/test_malformed.py` holds the others to the same promises.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tests.datasets.malformed_sheets import sheets

MAX_SECONDS, MAX_BYTES = 10.0, 2 << 30

Make = bytes | Callable[[Path], object]


class Case(NamedTuple):
    """One file: its name, its bytes or how to write them, and what must be said of it.

    `rule` is a rule that must be among the findings, `error` for a file that cannot be read at all, `refused` for an upload
    that is not taken, `good` for one that is only odd. `line` is where, when it matters.
    """

    name: str
    data: Make
    rule: str
    line: int | None = None
    giant: bool = False

    @property
    def filename(self) -> str:
        return self.name.rsplit(" / ", 1)[-1]

    def write(self, path: Path) -> None:
        if isinstance(self.data, bytes):
            path.write_bytes(self.data)
        else:
            self.data(path)


def chat(question: str = "What is a rib?", answer: str = "The side of a violin.") -> str:
    return json.dumps({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}, ensure_ascii=False)


GOOD = [chat(f"What is part number {n}?") for n in range(12)]
MEBI = 1 << 20


def around(line: str | bytes, after: int = 2) -> bytes:
    """A file of good rows with one bad line, which is the third."""
    rows = [row.encode() for row in GOOD]
    return b"\n".join([*rows[:after], line.encode("utf-8", "surrogatepass") if isinstance(line, str) else line, *rows[after:]]) + b"\n"


# Lines that are not rows --------------------------------------------------------------------------------------------------

LINES: dict[str, tuple[str | bytes, str]] = {
    "cut off": ('{"messages": [{"role": "user", "content": "a', "invalid_json"),
    "trailing comma": ('{"messages": [],}', "invalid_json"),
    "single quotes": ("{'messages': []}", "invalid_json"),
    "no quotes": ("{messages: []}", "invalid_json"),
    "two rows on a line": (GOOD[0] + GOOD[1], "invalid_json"),
    "a tab in a text": ('{"messages": "a\tb"}', "invalid_json"),
    "a NUL in a text": ('{"messages": "a\0b"}', "invalid_json"),
    "a bad escape": (r'{"messages": "\x41"}', "invalid_json"),
    "half an escape": (r'{"messages": "\u12"}', "invalid_json"),
    "a comment": ('{"messages": []} // good', "invalid_json"),
    "Python's words": ('{"messages": None}', "invalid_json"),
    "an equals sign": ('{"messages" = []}', "invalid_json"),
    "no value": ('{"messages": }', "invalid_json"),
    "only a bracket": ("{", "invalid_json"),
    "words": ("this is not JSON", "invalid_json"),
    "markup": ("<messages/>", "invalid_json"),
    "a key twice": ('{"messages": [], "messages": []}', "duplicate_key"),
    "a key twice deep inside": ('{"messages": [{"role": "user", "role": "user", "content": "a"}]}', "duplicate_key"),
    "not a number": ('{"messages": NaN}', "not_a_number"),
    "infinity": ('{"messages": [Infinity]}', "not_a_number"),
    "minus infinity": ('{"messages": -Infinity}', "not_a_number"),
    "a number without end": ('{"messages": [], "weight": 1e999}', "not_a_number"),
    "a NUL in a key": (r'{"messages": [], "a\u0000b": 1}', "nul"),
    "200 brackets": ('{"a": ' + "[" * 200 + "]" * 200 + "}", "too_deep"),
    "600 brackets": ('{"a": ' + "[" * 600 + "]" * 600 + "}", "too_deep"),
    "980 objects": ('{"a":' * 980 + "1" + "}" * 980, "too_deep"),
    "half an emoji": (r'{"messages": [{"role": "user", "content": "\ud83d"}]}', "lone_surrogate"),
    "the other half": (r'{"messages": [{"role": "user", "content": "\ude00 x"}]}', "lone_surrogate"),
    "half an emoji in a key": (r'{"\ud83d": 1}', "lone_surrogate"),
    "a list": ("[1, 2]", "wrong_shape"),
    "a number": ("3", "wrong_shape"),
    "a text": ('"text"', "wrong_shape"),
    "null": ("null", "wrong_shape"),
    "5,000 digits": ('{"messages": ' + "9" * 5000 + "}", "invalid_json"),
    "100,000 brackets": ('{"messages": ' + "[" * 100_000 + "]" * 100_000 + "}", "too_deep"),
    "100,000 objects": ('{"a":' * 100_000 + "1" + "}" * 100_000, "too_deep"),
    "17 MiB": ('{"messages": "' + "a" * (17 * MEBI) + '"}', "line_too_long"),
    "not UTF-8": ('{"messages": "Gr\xfc\xdfe"}'.encode("latin-1"), "not_utf8"),
    "a raw surrogate": (b'{"messages": "\xed\xa0\xbd"}', "not_utf8"),
    "an overlong slash": (b'{"messages": "\xc0\xaf"}', "not_utf8"),
    "0xFF": (b"\xff\xff\xff", "not_utf8"),
}


def lines() -> Iterator[Case]:
    for name, (line, rule) in LINES.items():
        yield Case(f"{name} / line.jsonl", around(line), rule, 3)
    bracketless = {"cut off", "two rows on a line", "a comment", "only a bracket", "100,000 brackets", "100,000 objects", "0xFF", "words"}
    for name, (line, rule) in LINES.items():
        if name not in bracketless:
            data = around(line).strip().replace(b"\n", b",\n")
            yield Case(f"{name}, in a list / element.json", b"[" + data + b"]", rule, 3)


# Encodings ----------------------------------------------------------------------------------------------------------------

TABLE = "text,label\n" + "".join(f"Wann kommt die Geige Nummer {n}? Grüße,delivery\n" for n in range(12))
TEXTS = "\n\n".join(f"Der Steg Nummer {n} ist aus Ahorn. Grüße aus Lüneburg." for n in range(12))
ROWS = "\n".join(chat(f"Grüße {n}") for n in range(12))


def encodings() -> Iterator[Case]:
    for suffix, text in (("jsonl", ROWS), ("csv", TABLE), ("txt", TEXTS), ("json", f"[{ROWS.replace(chr(10), ',')}]")):
        for encoding, rule in (
            ("utf-16", "utf_16"),
            ("utf-16-le", "utf_16"),
            ("utf-16-be", "utf_16"),
            ("utf-32", "utf_16"),
            ("utf-8-sig", "bom"),
        ):
            yield Case(f"{encoding} / x.{suffix}", text.encode(encoding), rule, 1)
        yield Case(f"utf-16 cut in the middle of a character / x.{suffix}", text.encode("utf-16")[:-1], "error")
        yield Case(f"utf-16 with half a pair / x.{suffix}", codecs.BOM_UTF16_LE + b"\x3d\xd8" * 30, "error")
        # One-byte encodings cannot be told apart; every line with such a byte is named.
        yield Case(f"latin-1 / x.{suffix}", text.encode("latin-1"), "error", 1 if suffix != "csv" else 2)
        yield Case(f"UTF-8 with one line of cp1252 / x.{suffix}", _mixed(text, suffix), "not_utf8")
        yield Case(f"a NUL / x.{suffix}", text.replace("Grüße", "Gr\0", 1).encode(), "invalid_json" if "json" in suffix else "nul")
    yield Case("Shift-JIS / x.txt", "\n".join(["ヴァイオリンの弦は四本です。"] * 12).encode("shift-jis"), "error", 1)
    yield Case("GBK / x.jsonl", "\n".join(chat("小提琴有几根弦？") for _ in range(9)).encode("gbk"), "error", 1)
    yield Case("two byte order marks / x.jsonl", codecs.BOM_UTF8 * 2 + ROWS.encode(), "invalid_json", 1)
    yield Case("only a byte order mark / x.csv", codecs.BOM_UTF8, "error", 1)
    yield Case("only a UTF-16 mark / x.jsonl", codecs.BOM_UTF16_LE, "error", 1)


def _mixed(text: str, suffix: str) -> bytes:
    old, new = "Nummer 5? Grüße" if suffix == "csv" else "Nummer 5 ist" if suffix == "txt" else "Grüße 5", "B\xfcgel"
    head, tail = text.split(old, 1)
    return head.encode() + old.encode() + b" " + new.encode("latin-1") + tail.encode()


# Tables -------------------------------------------------------------------------------------------------------------------


def tables() -> Iterator[Case]:
    def table(*rows: str, header: str = "text,label") -> bytes:
        return "\n".join([header, *rows, *(f"How long does the varnish number {n} dry?,repair" for n in range(12))]).encode()

    for mark, header in ((",", "text,label"), (";", "text;label"), ("|", "text|label"), ("\t", "text\tlabel")):
        rows = [f"How long does the varnish number {n} dry?{mark}repair" for n in range(12)]
        data = "\n".join([header, f"a{mark}b{mark}c", *rows, "alone"]).encode()
        yield Case(f"ragged, with {mark!r} / x.{'tsv' if mark == chr(9) else 'csv'}", data, "ragged", 2)
    yield Case("an open quote / x.csv", table() + b'\n"never closed,repair\nmore,repair\n', "open_quote", 14)
    yield Case("a quote inside a field / x.csv", table('"a" b,repair'), "bad_quotes", 2)
    yield Case("two columns of one name / x.csv", table(header="text,text"), "error", 1)
    yield Case("only a header / x.csv", b"text,label\n", "error")
    yield Case("only line ends / x.csv", b"\n" * 1000, "error")
    yield Case("no header / x.csv", b"1,2,3\n4,5,6\n", "error")
    yield Case("a header of blanks / x.csv", b" , , \n1,2,3\n", "error")
    yield Case("one column / x.csv", b"words\na\nb\n", "error")
    yield Case("10,001 columns / x.csv", ",".join(f"c{n}" for n in range(10_001)).encode() + b"\n1\n", "error")
    yield Case("a million columns / x.csv", ",".join(f"c{n}" for n in range(10**6)).encode() + b"\n1\n", "error")
    yield Case("a field of 131,073 characters / x.csv", table("a" * 131_073 + ",repair"), "good")
    yield Case("a field of 17 MiB / x.csv", table("a" * (17 * MEBI) + ",repair"), "line_too_long", 2)
    yield Case("a quoted field of 40 MiB over lines / x.csv", table('"' + ("a" * 99 + "\n") * (40 * MEBI // 100) + '",repair'), "error")
    yield Case("carriage returns alone / x.csv", table().replace(b"\n", b"\r"), "error")
    yield Case("an empty label / x.csv", table("a text,"), "no_label", 2)
    yield Case("an empty text / x.csv", table(",repair"), "empty", 2)
    yield Case("a label of 500 characters / x.csv", table("a text," + "l" * 500), "wrong_label", 2)
    yield Case("one class / x.csv", table(), "one_class")
    yield Case("a class with one row / x.csv", table("a,rare", "b,rent", "c,rent"), "rare_label")
    yield Case("labels of numbers and words / x.csv", table(*(f"text {n},{n % 2}" for n in range(6))), "mixed_labels")
    yield Case("JSON in a csv / x.csv", ROWS.encode(), "error")
    yield Case("a page of HTML / x.csv", b"<!doctype html><html><body><h1>404</h1></body></html>", "error")
    yield Case("a spreadsheet called csv / x.csv", zipped({"xl/workbook.xml": b"<x/>"}), "error")
    yield Case("blank lines first / x.csv", b"\n" * 40 + table("a,b,c"), "ragged", 42)
    yield Case("a megabyte of blank lines between rows / x.csv", table("a,b") + b"\n" * (3 * MEBI) + b"a,b,c\n", "ragged", 3 * MEBI + 14)
    yield Case("a header of Windows / x.csv", b"text,label,Gr\xf6\xdfe\n" + b"a,b,c\n" * 12, "not_utf8", 1)
    yield Case("blank lines between rows / x.csv", table().replace(b"\n", b"\n\n"), "one_class")


# JSON ---------------------------------------------------------------------------------------------------------------------


def documents() -> Iterator[Case]:
    body = b"[" + ",\n".join(GOOD).encode()
    yield Case("a list that is cut off / x.json", body, "invalid_json")
    yield Case("a list cut off inside a row / x.json", body + b',\n{"messages": [{"ro', "invalid_json")
    yield Case("an empty list / x.json", b"[]", "error")
    yield Case("a list of nothing / x.json", b"[,,,]", "error", 1)
    yield Case("a list of numbers / x.json", b"[1, 2, 3]", "error", 1)
    yield Case("a list of lists / x.json", b"[" + body + b"]]", "error", 1)
    yield Case("an empty object / x.json", b"{}", "error")
    yield Case("a number / x.json", b"42", "error", 1)
    yield Case("a text / x.json", b'"hello"', "error", 1)
    yield Case("white space / x.json", b" \n\t " * 5000, "error")
    yield Case("closing brackets / x.json", b"]" * 1000, "error", 1)
    yield Case("opening brackets / x.json", b"[" * 200_000, "error", 1)
    yield Case("opening braces / x.json", b'{"a":' * 200_000, "error", 1)
    yield Case("a row and garbage after it / x.json", body + b"] and some words", "good")
    yield Case("one column of columns / x.json", json.dumps({"messages": {"0": 1, "1": 2}}).encode(), "wrong_shape", 1)
    yield Case("rows under an unknown key / x.json", b'{"stuff": ' + body + b"]}", "error")
    yield Case("an open quote / x.json", b'[{"messages": "' + b"a" * 100_000, "error", 1)
    yield Case("a list in a .jsonl / x.jsonl", body + b"]", "json_array", 1)
    yield Case("pretty-printed rows / x.jsonl", "\n".join(json.dumps(json.loads(row), indent=2) for row in GOOD).encode(), "error", 1)
    yield Case("keys of no format / x.jsonl", b'{"colour": "red"}\n' * 12, "error")
    yield Case("10,000 keys / x.jsonl", json.dumps({f"k{n}": n for n in range(10_000)}).encode() + b"\n", "error")
    yield Case("rows of different keys / x.jsonl", around('{"prompt": "a", "completion": "b"}'), "missing_field", 3)
    yield Case("carriage returns / x.jsonl", ROWS.replace("\n", "\r\n").encode(), "good")
    yield Case("only line ends / x.jsonl", b"\n" * 100_000, "error")
    for name in ("x.jsonl", "x.json", "x.csv", "x.tsv", "x.txt", "x.parquet", "x.zip", "x.jsonl.gz"):
        yield Case(f"nothing at all / {name}", b"", "refused")


# Archives -----------------------------------------------------------------------------------------------------------------


def zipped(members: dict[str, bytes], how: int = zipfile.ZIP_DEFLATED) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", how) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return packed.getvalue()


def _zip_bomb(path: Path, megabytes: int = 4096) -> None:
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("a.jsonl", "w", force_zip64=True) as member,
    ):
        for _ in range(megabytes // 16):
            member.write(b"0" * (16 * MEBI))


def _gzip_bomb(path: Path, megabytes: int = 4096) -> None:
    with gzip.open(path, "wb", compresslevel=1) as member:
        for _ in range(megabytes // 16):
            member.write(b"0" * (16 * MEBI))


def _locked() -> bytes:
    """An archive whose one member says that it is encrypted."""
    data = bytearray(zipped({"a.jsonl": around(GOOD[0])}, zipfile.ZIP_STORED))
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = data.find(mark) + offset
        data[at] |= 1
    return bytes(data)


def _symlink() -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        link = zipfile.ZipInfo("a.jsonl")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    return packed.getvalue()


def _lying_size() -> bytes:
    data = bytearray(zipped({"a.jsonl": around(GOOD[0])}))
    at = data.find(b"PK\x01\x02") + 24
    data[at : at + 4] = struct.pack("<I", 10)
    return bytes(data)


def archives() -> Iterator[Case]:
    rows, whole = around(GOOD[0]), gzip.compress(around(GOOD[0]))
    yield Case("cut off / x.jsonl.gz", whole[:-20], "error")
    yield Case("cut off after its head / x.jsonl.gz", whole[:12], "error")
    yield Case("a wrong checksum / x.jsonl.gz", whole[:-8] + b"\0\0\0\0" + whole[-4:], "error")
    yield Case("bytes turned over / x.csv.gz", whole[:40] + bytes(255 - b for b in whole[40:60]) + whole[60:], "error")
    yield Case("no gzip at all / x.jsonl.gz", rows, "error", 1)
    yield Case("a gzip in a gzip / x.jsonl.gz", gzip.compress(whole), "error", 1)
    yield Case("an empty gzip / x.jsonl.gz", gzip.compress(b""), "error", 1)
    yield Case("a zlib stream / x.jsonl.gz", zlib.compress(rows), "error", 1)
    yield Case("garbage behind it / x.jsonl.gz", whole + b"garbage", "error")
    yield Case("a bomb of 256 MB / x.jsonl.gz", lambda path: _gzip_bomb(path, 256), "error")
    yield Case("no zip at all / x.zip", rows, "error", 1)
    yield Case("an empty zip / x.zip", zipped({}), "error", 1)
    yield Case("no data in it / x.zip", zipped({"a.exe": b"MZ", "b.py": b"import os"}), "error", 1)
    yield Case("two files / x.zip", zipped({"a.jsonl": rows, "b.jsonl": rows}), "several_files", 1)
    yield Case("files of two kinds / x.zip", zipped({"a.jsonl": rows, "b.csv": TABLE.encode()}), "error", 1)
    yield Case("a password / x.zip", _locked(), "error", 1)
    yield Case("cut off / x.zip", zipped({"a.jsonl": rows})[:-30], "error", 1)
    yield Case("a wrong size / x.zip", _lying_size(), "error")
    yield Case("a zip in a zip / x.zip", zipped({"a.zip": zipped({"a.jsonl": rows})}), "error", 1)
    yield Case("an empty member / x.zip", zipped({"a.jsonl": b""}), "error", 1)
    yield Case("10,001 members / x.zip", zipped({f"{n}.bin": b"" for n in range(10_001)}), "error", 1)
    yield Case("a bomb of 256 MB / x.zip", lambda path: _zip_bomb(path, 256), "error")
    yield Case("turned-over bytes / x.zip", _turned(zipped({"a.jsonl": rows * 50})), "error")
    for name in ("../../etc/cron.d/x.jsonl", "/etc/x.jsonl", "C:\\Windows\\x.jsonl", "..\\..\\x.jsonl", "a/" * 120 + "x.jsonl"):
        yield Case(f"a member that climbs out, {name[:24]} / x.zip", zipped({name: rows}), "duplicate", 3)
    yield Case("a member that is a link / x.zip", _symlink(), "error", 1)
    yield Case("a member of another kind / x.zip", zipped({"a.csv": rows}), "error")
    yield Case("a broken Parquet inside / x.zip", zipped({"a.parquet": b"PAR1 no PAR1"}), "error", 1)
    yield Case("a zip called gz / x.jsonl.gz", zipped({"a.jsonl": rows}), "error", 1)


def _turned(data: bytes) -> bytes:
    middle = len(data) // 3
    return data[:middle] + bytes(255 - b for b in data[middle : middle + 20]) + data[middle + 20 :]


# Parquet ------------------------------------------------------------------------------------------------------------------


def _parquet(columns: dict[str, object], **options: object) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = io.BytesIO()
    pq.write_table(pa.table(columns), out, **options)
    return out.getvalue()


def _parquet_bomb(path: Path) -> None:
    """A dictionary of one text of a megabyte, named 40,000 times: some kilobytes that unpack to 40 GB."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    indices = pa.array([0] * 40_000, pa.int32())
    column = pa.DictionaryArray.from_arrays(indices, pa.array(["a" * MEBI]))
    pq.write_table(pa.table({"text": column}), path, compression="zstd", row_group_size=40_000)


def _twice() -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = io.BytesIO()
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], ["text", "text", "label"]), out)
    return out.getvalue()


def parquets() -> Iterator[Case]:
    good = _parquet({"text": [f"How long does varnish {n} dry?" for n in range(20)], "label": ["a", "b"] * 10})
    yield Case("words / x.parquet", b"this is not parquet", "error", 1)
    yield Case("only the marks / x.parquet", b"PAR1PAR1", "error", 1)
    yield Case("cut off / x.parquet", good[: len(good) // 2], "error", 1)
    yield Case("no end / x.parquet", good[:-4], "error", 1)
    yield Case("a huge footer / x.parquet", good[:-8] + struct.pack("<I", 0xFFFFFFF0) + b"PAR1", "error", 1)
    yield Case("a broken footer / x.parquet", good[:-60] + bytes(255 - b for b in good[-60:-8]) + good[-8:], "error", 1)
    yield Case("broken pages / x.parquet", good[:8] + bytes(255 - b for b in good[8:120]) + good[120:], "error")
    yield Case("no rows / x.parquet", _parquet({"text": [], "label": []}), "error", 1)
    yield Case("no columns / x.parquet", _parquet({}), "error", 1)
    yield Case("only numbers / x.parquet", _parquet({"a": [1, 2, 3], "b": [1.5, 2.5, float("nan")]}), "error")
    yield Case("10,001 columns / x.parquet", _parquet({f"c{n}": [1] for n in range(10_001)}), "error", 1)
    yield Case("empty cells / x.parquet", _parquet({"text": ["a", None] * 9, "label": ["x", "y"] * 9}), "empty", 2)
    yield Case("lists for texts / x.parquet", _parquet({"text": [["a"], ["b"]] * 9, "label": ["x", "y"] * 9}), "wrong_shape", 1)
    yield Case("bytes that are no text / x.parquet", _parquet({"text": [b"\xff\xfe", b"ok"] * 9, "label": ["x", "y"] * 9}), "duplicate")
    yield Case(
        "numbers without end / x.parquet",
        _parquet({"text": ["a", "b"] * 9, "label": ["x", "y"] * 9, "n": [float("inf")] * 18}),
        "duplicate",
    )
    yield Case("a Parquet packed as gz / x.parquet.gz", gzip.compress(good), "good")
    yield Case("a broken gzip of a Parquet / x.parquet.gz", gzip.compress(good)[:-30], "error", 1)
    yield Case("two columns of one name / x.parquet", _twice(), "error", 1)
    yield Case("a dictionary bomb of 40 GB / x.parquet", _parquet_bomb, "error")
    yield Case("an Arrow file / x.parquet", b"ARROW1\0\0" + bytes(200) + b"ARROW1", "error", 1)
    yield Case("an encrypted one / x.parquet", b"PARE" + good[4:-4] + b"PARE", "error", 1)


def workbooks() -> Iterator[Case]:
    yield from (Case(*found) for found in sheets())


# Rows of the wrong kind ---------------------------------------------------------------------------------------------------


def turns(*pairs: tuple[object, object], **rest: object) -> str:
    return json.dumps({"messages": [{"role": role, "content": text} for role, text in pairs], **rest})


ASKED, SAID = ("user", "a"), ("assistant", "b")
CHATS: dict[str, tuple[str, str]] = {
    "bot and customer": (turns(("customer", "a"), ("bot", "b")), "wrong_role"),
    "a capital letter": (turns(("User", "a"), SAID), "wrong_role"),
    "no role": ('{"messages": [{"content": "a"}, {"role": "assistant", "content": "b"}]}', "wrong_role"),
    "a number for a role": (turns((3, "a"), SAID), "wrong_role"),
    "an unknown role": (turns(("narrator", "a"), SAID), "wrong_role"),
    "two users": (turns(ASKED, ASKED, SAID), "wrong_role_order"),
    "two answers": (turns(ASKED, SAID, SAID), "wrong_role_order"),
    "a system later": (turns(ASKED, ("system", "s"), SAID), "wrong_role_order"),
    "the user last": (turns(ASKED, SAID, ASKED), "wrong_role_order"),
    "the assistant first": (turns(SAID, ASKED, SAID), "wrong_role_order"),
    "a tool without a call": (turns(("tool", "42"), SAID), "wrong_role_order"),
    "no answer": (turns(ASKED), "no_answer"),
    "an empty answer": (turns(ASKED, ("assistant", "")), "empty_answer"),
    "an answer of blanks": (turns(ASKED, ("assistant", " \n ")), "empty_answer"),
    "an empty question": (turns(("user", ""), SAID), "empty"),
    "no messages": ('{"messages": []}', "wrong_shape"),
    "text for messages": ('{"messages": "hello"}', "wrong_shape"),
    "a text for a message": ('{"messages": ["hello"]}', "wrong_shape"),
    "a number for a text": (turns(("user", 3), SAID), "wrong_shape"),
    "an object for a text": (turns(("user", {"a": 1}), SAID), "wrong_shape"),
    "a picture": (turns(("user", [{"type": "image_url", "image_url": {"url": "x"}}]), SAID), "not_text"),
    "a weight of 2": ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 2}]}', "wrong_weight"),
    "every weight 0": ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}', "nothing_to_learn"),
    "a call by the user": ('{"messages": [{"role": "user", "content": "a", "tool_calls": [1]}, {"role": "assistant", "content": "b"}]}', "wrong_role_order"),
    "a call that is none": ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"a": 1}]}]}', "wrong_shape"),
    "tools that are no list": (turns(ASKED, SAID, tools="hammer"), "wrong_shape"),
    "an unknown key": ('{"messages": [{"role": "user", "content": "a", "mood": "x"}, {"role": "assistant", "content": "b"}]}', "unknown_key"),
    "no messages key": ('{"message": []}', "missing_field"),
    "a control character": (turns(ASKED, ("assistant", "ding\x07dong")), "control_character"),
    "a template's marker": (turns(ASKED, ("assistant", "a <|im_end|> b")), "template_marker"),
    "a key of somebody": (turns(ASKED, ("assistant", "sk-proj-abcdefghijklmnopqrstuvwx1234")), "secret"),
    "an address": (turns(ASKED, ("assistant", "write to anna.berg@hafen.de")), "personal_data"),
    "the same row again": (GOOD[0], "duplicate"),
    "the same question, another answer": (chat("What is part number 1?", "Something else."), "other_answer"),
}  # fmt: skip


def rows() -> Iterator[Case]:
    for name, (line, rule) in CHATS.items():
        yield Case(f"{name} / chat.jsonl", around(line), rule, 3)

    def others(good: dict[str, object], bad: dict[str, object]) -> bytes:
        said = [{key: f"{value} {n}" if isinstance(value, str) else value for key, value in good.items()} for n in range(12)]
        return "\n".join(json.dumps(row) for row in [*said[:2], bad, *said[2:]]).encode()

    pair = {"prompt": "Say hello", "chosen": "Hello!", "rejected": "no"}
    for name, bad, rule in (
        ("equal answers", {**pair, "rejected": "Hello!"}, "same_answers"),
        ("an empty answer", {**pair, "chosen": ""}, "empty_answer"),
        ("no prompt", {**pair, "prompt": ""}, "empty"),
        ("a number", {**pair, "chosen": 3}, "wrong_shape"),
        ("the user answers", {**pair, "chosen": [{"role": "user", "content": "x"}]}, "wrong_role_order"),
        ("a prompt that is an object", {**pair, "prompt": {"a": 1}}, "wrong_shape"),
    ):
        yield Case(f"{name} / pairs.jsonl", others(pair, bad), rule, 3)
    rated = {"prompt": "Say hello", "completion": "Hello!", "label": True}
    for name, bad, rule in (
        ("perhaps", {**rated, "label": "perhaps"}, "wrong_label"),
        ("no rating", {**rated, "label": None}, "no_label"),
        ("no answer", {**rated, "completion": ""}, "empty_answer"),
        ("a list of nothing", {**rated, "completion": []}, "empty_answer"),
    ):
        yield Case(f"{name} / rated.jsonl", others(rated, bad), rule, 3)
    told = {"instruction": "Say hello", "output": "Hello!"}
    for name, bad, rule in (
        ("an empty output", {**told, "output": ""}, "empty_answer"),
        ("no instruction", {"output": "x"}, "empty"),
        ("a list for an output", {**told, "output": ["a"]}, "wrong_shape"),
    ):
        yield Case(f"{name} / alpaca.jsonl", others(told, bad), rule, 3)
    talk = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    for name, bad, rule in (
        ("an unknown speaker", {"conversations": [{"from": "alien", "value": "a"}, {"from": "gpt", "value": "b"}]}, "wrong_role"),
        ("no speaker", {"conversations": [{"value": "a"}]}, "wrong_shape"),
        ("no value", {"conversations": [{"from": "human"}, {"from": "gpt", "value": "b"}]}, "empty"),
    ):
        yield Case(f"{name} / sharegpt.jsonl", others(talk, bad), rule, 3)
    for name, bad, rule in (
        ("a fraction for a label", {"text": "a", "label": 0.5}, "wrong_label"),
        ("a list for a label", {"text": "a", "label": ["x"]}, "wrong_shape"),
        ("no text", {"label": "x"}, "empty"),
    ):
        yield Case(f"{name} / labels.jsonl", others({"text": "A text", "label": "x"}, bad), rule, 3)
    yield Case(
        "a NUL in a label / labels.jsonl", others({"text": "A text", "label": "x"}, {"text": "a", "label": "x\0y"}), "wrong_label", 3
    )
    yield Case("a cell 600 deep / cells.csv", f'messages,tools\n"{"[" * 600 + "]" * 600}",x\n'.encode(), "wrong_shape", 2)
    yield Case("two rows / chat.jsonl", "\n".join(GOOD[:2]).encode(), "few_rows")


# Texts and names ----------------------------------------------------------------------------------------------------------


def texts() -> Iterator[Case]:
    yield Case("only blanks / x.txt", b" \n\t\n" * 1000, "error")
    yield Case("a picture / x.txt", b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 40, "not_utf8", 1)
    yield Case("a program / x.txt", b"\x7fELF" + bytes(range(256)) * 40, "error", 1)
    yield Case("zeros / x.txt", bytes(MEBI), "error")
    yield Case("zeros / x.jsonl", bytes(MEBI), "error")
    yield Case("control characters / x.txt", "\n\n".join(f"Passage \x07 {n}" for n in range(12)).encode(), "control_character", 1)
    yield Case("a line of 17 MiB / x.txt", b"a" * (17 * MEBI) + b"\n\nand a passage\n", "line_too_long", 1)
    for name in (
        "x",
        "x.exe",
        "x.xls",
        "x.pdf",
        "x.tar.gz",
        "x.7z",
        "x.bz2",
        "x.docx",
        "x.pkl",
        "x.gz",
        "x.arrow",
        ".jsonl",
        "x.jsonl.exe",
    ):
        yield Case(f"a name no reader takes / {name}", ROWS.encode(), "refused")
    for name in ("X.JSONL", "ä ö ü 😀.jsonl", "a" * 300 + ".jsonl", "../../etc/passwd.jsonl", "..\\x.jsonl", "<b>.jsonl", "a\tb.jsonl"):
        yield Case(f"an odd name / {name}", around(GOOD[0]), "duplicate", 3)


# A gigabyte ---------------------------------------------------------------------------------------------------------------


def _repeat(piece: bytes, head: bytes = b"", tail: bytes = b"") -> Callable[[Path], None]:
    def write(path: Path) -> None:
        block = piece * (MEBI // len(piece))
        with path.open("wb") as out:
            out.write(head)
            for _ in range(1024):
                out.write(block)
            out.write(tail)

    return write


def giants() -> Iterator[Case]:
    good = "\n".join(GOOD).encode()
    yield Case("one line of 1 GB / x.jsonl", _repeat(b"a", good + b'\n{"messages": "', b'"}\n' + good), "line_too_long", 13, True)
    yield Case(
        "one element of 1 GB / x.json", _repeat(b"a", b"[" + GOOD[0].encode() + b',{"messages": "', b'"}]'), "line_too_long", None, True
    )
    yield Case("one field of 1 GB / x.csv", _repeat(b"a", b"text,label\na,b\n", b",c\nd,e\n"), "line_too_long", 3, True)
    yield Case("an open quote and 1 GB / x.csv", _repeat(b"aaaaaaa\n", b'text,label\n"'), "error", None, True)
    yield Case("1 GB without a line end / x.txt", _repeat(b"a"), "error", 1, True)
    yield Case("1 GB of brackets / x.json", _repeat(b"["), "error", 1, True)
    yield Case("1 GB of braces / x.jsonl", _repeat(b"{"), "error", 1, True)
    yield Case("1 GB of line ends / x.jsonl", _repeat(b"\n"), "error", None, True)
    yield Case("1 GB of zeros / x.jsonl", _repeat(b"\0"), "error", None, True)
    yield Case("a bomb of 4 GB / x.jsonl.gz", _gzip_bomb, "error", None, True)
    yield Case("a bomb of 4 GB / x.zip", _zip_bomb, "error", None, True)


def cases(*, with_giants: bool = False) -> list[Case]:
    """Every case, in groups."""
    groups = [lines, encodings, tables, documents, archives, parquets, workbooks, rows, texts] + ([giants] if with_giants else [])
    return [case for group in groups for case in group()]


if __name__ == "__main__":
    from tests.datasets.malformed_run import main

    main()
