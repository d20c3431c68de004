"""The benchmark of a comparison draws rows as they are, and prints what the studio told."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from app.evaluation.comparison_table import COSTS, score_columns
from benchmarks.comparison import as_text, drawn


def test_rows_are_drawn_once_and_left_in_their_order(tmp_path: Path) -> None:
    table, lines = tmp_path / "a.csv", tmp_path / "a.jsonl"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([["text", "category"], *([f"row {n},\nof two lines", n % 3] for n in range(40))])
    head, *body = csv.reader(drawn(table, 10).decode().splitlines(keepends=True))
    numbers = [int(text.split()[1].strip(",")) for text, _ in body]
    assert head == ["text", "category"] and len(numbers) == 10 and numbers == sorted(set(numbers)) != list(range(10))
    lines.write_text("".join(json.dumps({"n": n}) + "\n" for n in range(40)))
    assert [json.loads(line)["n"] for line in drawn(lines, 10).splitlines()] == numbers
    assert drawn(lines, 99) == lines.read_bytes()


def test_the_table_shows_what_was_predicted_and_who_is_best() -> None:
    columns = [*score_columns("preference"), *COSTS]
    row = {column.key: 1.0 for column in columns} | {column.predicted: 1.5 for column in columns if column.predicted}
    rows = [
        {**row, "job": f"j{n}", "title": f"Way {n}", "verdict": "within noise", "seconds": 60.0, "predicted_seconds": 30.0 * n}
        for n in (1, 2)
    ]
    winners = {column.key: [] for column in columns} | {"seconds": ["j2"]}
    found = {"name": "Two", "columns": [c._asdict() for c in columns], "data": rows, "winners": winners, "bases": {"Tiny": {"loss": 2.0}}}
    said = as_text(found)
    assert "30 s → 1 min" in said and "1 min → 1 min *" in said and said.count("*") == 1
    assert "predicted time is off by 50% at most" in said and "within noise" in said
    assert "base model Tiny" in said and "2.000" in said
