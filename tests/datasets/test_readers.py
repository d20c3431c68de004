"""Readers: every good row arrives, and everything bad is said with its line."""

import codecs
import csv
import gzip
import io
import json
import zipfile
from datetime import datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.datasets import readers
from app.datasets.readers import _base, _json, _tables
from app.errors import BadData, Unsupported
from tests.datasets.malformed_sheets import ROWS, workbook


def read(tmp_path, name, data):
    path = tmp_path / "blob"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return list(readers.read(path, name))


def problems(raws, *, notes=False):
    return [(raw.line, raw.problem.rule) for raw in raws if raw.problem and (notes or raw.problem.severity == "error")]


def rows(raws):
    return [(raw.line, raw.row) for raw in raws if raw.row is not None]


GOOD = {"a": 1}


@pytest.mark.parametrize(
    ("line", "rule", "words"),
    [
        ('{"a": 1', "invalid_json", "does not end"),
        ('{"a": 1,}', "invalid_json", "comma"),
        ("{'a': 1}", "invalid_json", "double quotes"),
        ('{"a": 1}{"a": 2}', "invalid_json", "Two rows"),
        ('{"a": "x\ty"}', "invalid_json", "tabs"),
        ('{"a": 1, "a": 2}', "duplicate_key", "“a”"),
        ('{"a": NaN}', "not_a_number", "null"),
        ('{"a": -Infinity}', "not_a_number", "null"),
        ('{"a": "\\ud83d"}', "lone_surrogate", "\\ud83d"),
        ("[1]", "wrong_shape", "a list"),
        ("3", "wrong_shape", "a number"),
        ('{"a": "x\0y"}', "invalid_json", "control"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "too_deep", "Flatten"),
        ('{"a": ' + "9" * 5000 + "}", "invalid_json", "digits"),
    ],
)
def test_a_bad_line_is_named_and_harms_no_other(tmp_path, line, rule, words):
    raws = read(tmp_path, "x.jsonl", '{"a": 1}\n' + line + '\n\n{"a": 1}\n')
    assert rows(raws) == [(1, GOOD), (4, GOOD)]
    assert problems(raws) == [(2, rule)]
    assert words in next(raw.problem.message for raw in raws if raw.problem)


def test_bytes_that_are_not_utf8(tmp_path):
    raws = read(tmp_path, "x.jsonl", b'{"a": 1}\n{"a": "caf\xe9"}\n{"a": 1}')
    assert problems(raws) == [(2, "not_utf8")]
    assert "café" in raws[1].problem.value
    assert len(rows(raws)) == 2


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.txt"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings_are_read_with_a_note(tmp_path, name, encoding):
    text = {"x.jsonl": '{"a": "é"}\n', "x.json": '[{"a": "é"}]', "x.csv": "a\né\n", "x.txt": "é, and some more text"}[name]
    raws = read(tmp_path, name, (text * (1 if name == "x.json" else 2)).encode(encoding))
    assert rows(raws)
    assert not problems(raws)
    assert problems(raws, notes=True)


def test_a_broken_utf_16_file_is_refused(tmp_path):
    with pytest.raises(BadData, match="broken"):
        read(tmp_path, "x.txt", codecs.BOM_UTF16_LE + b"\x00\xd8\x41\x00")


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.txt", "x.parquet", "x.zip", "x.jsonl.gz"])
def test_an_empty_file_is_refused(tmp_path, name):
    with pytest.raises(BadData, match="empty"):
        read(tmp_path, name, b"")


@pytest.mark.parametrize("name", ["x", "x.xls", "x.pdf", "x.gz", ".jsonl.exe", "x.bin.gz"])
def test_an_unknown_extension_names_the_known_ones(tmp_path, name):
    with pytest.raises(Unsupported) as caught:
        read(tmp_path, name, b"a")
    assert ".jsonl" in caught.value.hint


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.txt"])
def test_a_line_too_long_is_skipped_without_being_held(tmp_path, name, monkeypatch):
    monkeypatch.setattr(_base, "MAX_LINE_BYTES", 3 << 20)
    long = "x" * (5 << 20)
    text = {
        "x.jsonl": '{"a": 1}\n{"a": "' + long + '"}\n{"a": 1}\n',
        "x.json": '[{"a": 1},\n{"a": "' + long + '"},\n{"a": 1}]',
        "x.csv": "a\n1\n" + long + "\n1\n",
        "x.txt": "one\n" + long + "\ntwo\n",
    }[name]
    raws = read(tmp_path, name, text)
    assert problems(raws)[0] == ({"x.csv": 3}.get(name, 2), "line_too_long")
    assert len(rows(raws)) >= 1


@pytest.mark.long
@given(values=st.lists(st.dictionaries(st.text(st.characters(codec="utf-8", min_codepoint=1), max_size=8), st.recursive(st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="utf-8")), lambda x: st.lists(x, max_size=3), max_leaves=5), max_size=4), max_size=8), indent=st.sampled_from([None, 1, 4]), chunk=st.integers(1, 40))  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_any_json_list_is_read_back_whatever_the_chunks(values, indent, chunk):
    for ascii_ in (True, False):
        data = json.dumps(values, indent=indent, ensure_ascii=ascii_).encode()
        pieces = iter([data[at : at + chunk] for at in range(0, len(data), chunk)])
        raws = list(_json.read_json(pieces))
        assert [raw.row for raw in raws] == values


@given(values=st.lists(st.dictionaries(st.text(st.characters(codec="utf-8", min_codepoint=1), min_size=1), st.text(st.characters(codec="utf-8")), min_size=1), min_size=1, max_size=6), chunk=st.integers(1, 30))  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_any_json_lines_are_read_back_whatever_the_chunks(values, chunk):
    data = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()
    raws = list(_json.read_jsonl(iter([data[at : at + chunk] for at in range(0, len(data), chunk)])))
    assert [raw.row for raw in raws] == values
    assert [raw.line for raw in raws] == list(range(1, len(values) + 1))


@given(cells=st.lists(st.tuples(*[st.text(st.characters(codec="utf-8", exclude_characters="\r\0\x85\u2028\u2029"), min_size=1)] * 2), min_size=1, max_size=6))  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_any_table_written_by_the_csv_module_is_read_back(cells):
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([("first", "second"), *cells])
    raws = list(_tables.read_csv(iter([out.getvalue().encode()])))
    assert [tuple(raw.row.values()) for raw in raws if raw.row] == cells


@given(data=st.binary(max_size=400), name=st.sampled_from(["x.jsonl", "x.json", "x.csv", "x.tsv", "x.txt", "x.parquet", "x.xlsx", "x.zip", "x.txt.gz"]))  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_no_bytes_at_all_raise_anything_but_our_own_errors(tmp_path_factory, data, name):
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(data)
    try:
        for raw in readers.read(path, name):
            assert raw.line >= 1
            assert (raw.row is None) == (raw.problem is not None)
    except BadData as error:
        assert error.hint


def test_a_json_list_with_one_broken_element(tmp_path):
    raws = read(tmp_path, "x.json", '[\n {"a": 1},\n {"a": },\n\n {"a": "],[{"}\n]\n')
    assert rows(raws) == [(2, GOOD), (5, {"a": "],[{"})]
    assert problems(raws) == [(3, "invalid_json")]


def test_a_json_list_that_was_cut_off(tmp_path):
    raws = read(tmp_path, "x.json", '[{"a": 1},\n{"a": 1},\n{"a"')
    assert len(rows(raws)) == 2
    assert problems(raws)[-1][1] == "invalid_json"
    assert "cut off" in raws[-1].problem.message


@pytest.mark.parametrize(
    "text",
    ['{"a": 1}\n{"a": 1}', '{\n "a": 1\n}\n{\n "a": 1\n}', '{"data": [{"a": 1}, {"a": 1}]}', '\n [{"a": 1}, {"a": 1}]\n'],
)
def test_other_things_people_call_json(tmp_path, text):
    assert [row for _, row in rows(read(tmp_path, "x.json", text))] == [GOOD, GOOD]


def test_a_list_in_a_jsonl_file_is_read_as_one(tmp_path):
    raws = read(tmp_path, "x.jsonl", '[{"a": 1}, {"a": 1}]')
    assert len(rows(raws)) == 2
    assert problems(raws, notes=True) == [(1, "json_array")]


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
def test_the_delimiter_of_a_table_is_found(tmp_path, mark):
    raws = read(tmp_path, "x.csv", f"a{mark}b\r\n1{mark}2\r\n")
    assert rows(raws) == [(2, {"a": "1", "b": "2"})]


def test_ragged_rows_and_open_quotes_have_their_lines(tmp_path):
    text = 'a,b\n1,2\n1,2,3\n"x\ny",2\n1\n\n3,"4" 5\n7,8\n9,"open\n'
    raws = read(tmp_path, "x.csv", text)
    assert rows(raws) == [(2, {"a": "1", "b": "2"}), (4, {"a": "x\ny", "b": "2"}), (9, {"a": "7", "b": "8"})]
    assert problems(raws) == [(3, "ragged"), (6, "ragged"), (8, "bad_quotes"), (10, "open_quote")]


def test_a_field_of_131073_characters_is_read(tmp_path):
    raws = read(tmp_path, "x.csv", "a,b\n" + "x" * 131_073 + ",1\n")
    assert len(raws[0].row["a"]) == 131_073


def test_two_columns_of_one_name_are_refused(tmp_path):
    with pytest.raises(BadData, match="Two columns"):
        read(tmp_path, "x.csv", "a,a\n1,2\n")


def test_text_in_paragraphs_lines_and_one_long_passage(tmp_path):
    assert rows(read(tmp_path, "x.txt", "one\ntwo\n\n\nthree\n")) == [(1, {"text": "one\ntwo"}), (5, {"text": "three"})]
    assert rows(read(tmp_path, "x.txt", "one\ntwo\n")) == [(1, {"text": "one"}), (2, {"text": "two"})]
    text = "A sentence of some length. " * 1000
    pieces = [row["text"] for _, row in rows(read(tmp_path, "x.txt", text))]
    assert all(len(piece) <= _base.MAX_PASSAGE_LENGTH and piece.endswith(".") for piece in pieces)
    assert " ".join(pieces) == text.strip()


def test_a_workbook_gives_values_by_their_kind_and_names_what_it_left(tmp_path):
    when = datetime(2026, 3, 1)
    table = [
        ["text", "when", "n", "share", "ok"],
        ["Grüße\nAda", when, 3.0, 0.25, True],
        [],
        [None, when.replace(hour=9), None, 1e300, None],
    ]
    raws = read(tmp_path, "x.xlsx", workbook([], [["Tickets 2026"], [], *table], [["other"]]))
    assert rows(raws) == [
        (4, {"text": "Grüße\nAda", "when": "2026-03-01", "n": 3, "share": 0.25, "ok": True}),
        (6, {"text": None, "when": "2026-03-01T09:00:00", "n": None, "share": 1e300, "ok": None}),
    ]
    assert problems(raws, notes=True) == [(1, "other_sheets"), (1, "title_rows")]
    assert rows(read(tmp_path, "x.xlsx.gz", gzip.compress(workbook(ROWS))))[0][0] == 2


def test_parquet_with_nested_rows(tmp_path):
    table = pa.table({"messages": [[{"role": "user", "content": "a"}]], "score": [float("nan")]})
    pq.write_table(table, tmp_path / "blob")
    raws = list(readers.read(tmp_path / "blob", "x.parquet"))
    assert rows(raws) == [(1, {"messages": [{"role": "user", "content": "a"}], "score": None})]


def test_gz_and_zip_are_read_and_never_unpacked_to_a_path(tmp_path):
    data = b'{"a": 1}\n'
    assert rows(read(tmp_path, "x.jsonl.gz", gzip.compress(data))) == [(1, GOOD)]
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("../../escape.jsonl", data)
        archive.writestr("__MACOSX/._escape.jsonl", b"x")
        archive.writestr("README.md", b"x")
    assert rows(read(tmp_path, "x.zip", packed.getvalue())) == [(1, GOOD)]
    assert [path.name for path in tmp_path.iterdir()] == ["blob"]


@pytest.mark.parametrize(("name", "words"), [("x.jsonl.gz", "unpacks"), ("x.zip", "unpacks")])
def test_bombs_stop_early(tmp_path, name, words):
    zeros = b"0" * (1 << 20)
    packed = io.BytesIO()
    if name == "x.zip":
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.jsonl", "w") as member:
            for _ in range(200):
                member.write(zeros)
    else:
        with gzip.GzipFile(fileobj=packed, mode="wb") as member:
            for _ in range(200):
                member.write(zeros)
    with pytest.raises(BadData, match=words):
        read(tmp_path, name, packed.getvalue())


def test_several_files_of_one_kind_are_read_as_one_with_their_lines_counted_on(tmp_path):
    table = io.BytesIO()
    pq.write_table(pa.table({"a": [1, 2]}), table)
    for kind, data in (("jsonl", b'{"a": 1}\n\n{"a": 2}\n'), ("parquet", table.getvalue())):
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            for name in (f"b.{kind}", f"deep/a.{kind}", "LICENSE.txt"):
                archive.writestr(name, data)
        raws = read(tmp_path, "x.zip", packed.getvalue())
        lines = (1, 3, 4, 6) if kind == "jsonl" else (1, 2, 3, 4)
        assert rows(raws) == list(zip(lines, [GOOD, {"a": 2}] * 2, strict=True))
        assert [(raw.line, raw.problem.rule) for raw in raws if raw.problem] == [(1, "several_files"), (lines[1] + 1, "several_files")]


def test_a_parquet_may_be_packed_and_has_each_column_once(tmp_path):
    table = io.BytesIO()
    pq.write_table(pa.table({"a": [1]}), table)
    assert rows(read(tmp_path, "x.parquet.gz", gzip.compress(table.getvalue()))) == [(1, GOOD)]
    twice = io.BytesIO()
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], ["a", "a"]), twice)
    with pytest.raises(BadData, match="Two columns are called “a”"):
        read(tmp_path, "x.parquet", twice.getvalue())


@pytest.mark.parametrize("members", [(), ("a.csv", "b.tsv"), ("a.exe",)])
def test_an_archive_must_hold_data_files_of_one_kind(tmp_path, members):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name in members:
            archive.writestr(name, "a\n1\n")
    with pytest.raises(BadData, match="archive holds"):
        read(tmp_path, "x.zip", packed.getvalue())


@pytest.mark.parametrize("name", ["x.parquet", "x.zip", "x.csv.gz"])
def test_broken_containers_say_so(tmp_path, name):
    with pytest.raises(BadData) as caught:
        read(tmp_path, name, b"PK\x03\x04 this is not one PAR1")
    assert caught.value.hint


def test_what_cannot_be_repaired_is_not_offered_to_be(tmp_path):
    hopeless = [
        '{"a": 1}{"a": 2}',
        "words",
        "{",
        "[1]",
        '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}",
        "{'a': " + "(" * 5000 + ")" * 5000 + "}",
    ]
    raws = read(tmp_path, "x.jsonl", "\n".join(hopeless))
    assert len(raws) == len(hopeless) and all(raw.repaired is None and raw.problem.fix is None for raw in raws)
    assert read(tmp_path, "y.jsonl", b'{"a": "\x81\xfc"}')[0].repaired is None  # no letter of Windows-1252
