"""Splits: seeded, stratified, grouped; equal rows stay together; what stands on both sides is told."""

import json
from collections import Counter

import pytest

from app.datasets import splits
from app.datasets.splits import NumberedRow, divide, overlap
from app.errors import BadData


def labelled(counts):
    names = [name for name, count in counts.items() for _ in range(count)]
    return [NumberedRow(n, {"text": f"text {n}", "label": name, "metadata": {"who": f"p{n % 7}"}}) for n, name in enumerate(names)]


def test_the_seed_decides_and_order_does_not():
    rows = labelled({"a": 200})
    first = {r.line for r, out in zip(rows, divide(rows, 0.1, 1), strict=True) if out}
    turned = list(reversed(rows))
    assert first == {r.line for r, out in zip(turned, divide(turned, 0.1, 1), strict=True) if out}
    assert len(first) == 20 and first != {r.line for r, out in zip(rows, divide(rows, 0.1, 2), strict=True) if out}


def test_every_label_keeps_its_share():
    rows = labelled({"a": 500, "b": 50, "c": 10, "d": 1})
    held = divide(rows, 0.1, 3, "stratified")
    assert Counter(r.row["label"] for r, out in zip(rows, held, strict=True) if out) == {"a": 50, "b": 5, "c": 1}


def test_groups_are_never_torn():
    rows = labelled({"a": 700})
    held = divide(rows, 0.3, 5, "grouped", "who")
    inside = {r.row["metadata"]["who"] for r, out in zip(rows, held, strict=True) if out}
    outside = {r.row["metadata"]["who"] for r, out in zip(rows, held, strict=True) if not out}
    assert not inside & outside and len(inside) == 2
    with pytest.raises(BadData, match="no column"):
        divide(rows, 0.3, 5, "grouped", "nobody")
    with pytest.raises(BadData, match="one group"):
        divide([NumberedRow(1, {"metadata": {"a": 1}}), NumberedRow(2, {"metadata": {"a": 1}})], 0.5, 1, "grouped", "a")


def test_equal_rows_stay_together_in_every_way_of_splitting():
    rows = [NumberedRow(n, {"text": f"t{n % 20}", "label": "ab"[n % 2]}) for n in range(200)]
    for method in ("random", "stratified"):
        sides = {}
        for row, out in zip(rows, divide(rows, 0.2, 1, method), strict=True):
            sides.setdefault(row.row["text"], set()).add(out)
        assert all(len(side) == 1 for side in sides.values())


def test_what_a_model_does_not_see_makes_no_row_different():
    """Every row of a joined dataset says its own source line; of equal texts all are learnt or all are held out."""
    rows = [
        NumberedRow(n, {"text": f"t{n % 20}", "label": "ab"[n % 2], "metadata": {"source_line": n, "who": f"p{n}"}}) for n in range(200)
    ]
    for method, column in (("random", None), ("stratified", None), ("stratified", "source_line"), ("grouped", "who")):
        sides = {}
        for row, out in zip(rows, divide(rows, 0.2, 1, method, column), strict=True):
            sides.setdefault(row.row["text"], set()).add(out)
        assert all(len(side) == 1 for side in sides.values()), (method, column)
        assert {True, False} == set.union(*sides.values()) or column == "source_line"


def test_overlap_is_found_whatever_the_spelling():
    def chat(question, answer):
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}

    train = [NumberedRow(1, chat("Where is it?", "Here")), NumberedRow(2, chat("Why?", "So")), NumberedRow(3, {"text": "Café  bleu"})]
    held = [
        NumberedRow(9, chat("where is  IT?", "here")),
        NumberedRow(8, chat("Why?", "Because")),
        NumberedRow(7, {"text": "cafe\u0301 bleu"}),
        NumberedRow(6, chat("x", "y")),
    ]
    assert overlap(train, held) == [(9, 1, "row"), (8, 2, "prompt"), (7, 3, "row")]


def test_a_look_before_the_launch(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = labelled({"a": 90, "b": 10})
    pq.write_table(pa.table({"line": [r.line for r in rows], "row": [json.dumps(r.row) for r in rows]}), tmp_path / "r.parquet")
    payload = {"rows": tmp_path / "r.parquet", "fraction": 0.1, "seed": 1, "method": "stratified"}
    found = splits.look(payload, print)
    assert (found["train"], found["validation"], found["overlap"]) == (90, 10, 0)
    assert found["labels"] == [["a", 81, 9], ["b", 9, 1]]
    twice = splits.look({**payload, "validation": tmp_path / "r.parquet"}, print)
    assert twice["overlap"] == twice["whole"] == 100


def test_what_is_to_be_dropped_leaves_nothing_on_both_sides(tmp_path):
    """Also where fewer rows are divided differently, and where many rows to learn from share one held-out prompt."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def write(rows):
        lines, texts = zip(*rows, strict=True)
        pq.write_table(pa.table({"line": lines, "row": texts}), tmp_path / "r.parquet")
        return splits.look({"rows": tmp_path / "r.parquet", "fraction": 0.3, "seed": 1, "method": "random"}, print)

    rows = [(n, json.dumps({"prompt": f"p{n % 150}", "completion": f"c{n}"})) for n in range(1, 301)]
    found = write(rows)
    assert found["overlap"] > 30 and found["whole"] == 0 and len(found["drop"]) >= 30
    after = write([row for row in rows if row[0] not in found["drop"]])
    assert after["overlap"] == 0 and after["drop"] == [] and after["validation"] > 20
