"""One bad row among ten thousand is named by its line, and costs the others nothing."""

from __future__ import annotations

import json

import pytest
from sqlalchemy import select

from app.datasets import ingest_task
from app.datasets import service as datasets
from app.storage import files
from app.tables import Finding

ROWS, BAD = 10_000, 9_999


@pytest.mark.parametrize(
    ("bad", "code"),
    [('{"prompt": "broken', "json"), ('{"prompt": "A question?"}', "completion")],
    ids=["no JSON", "no answer"],
)
def test_a_bad_row_is_named_by_its_line(session, user, data_dir, bad, code):
    lines = [json.dumps({"prompt": f"Question {n}?", "completion": f"Answer {n}."}) for n in range(1, ROWS + 1)]
    lines[BAD - 1] = bad
    file = files.add_bytes(session, user, "\n".join(lines).encode(), "rows.jsonl", "fine-tune")
    made = datasets.create(session, user, file)
    session.commit()
    ingest_task.read(made.id)
    session.refresh(made)
    assert (made.status, made.good_rows) == ("ready", ROWS - 1), made.error
    (finding,) = session.scalars(select(Finding).where(Finding.dataset_id == made.id, Finding.severity == "error")).all()
    assert finding.line == BAD and code in finding.message.lower() and " at at " not in finding.message
