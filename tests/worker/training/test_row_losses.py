"""The loss ledger: every row, once before and once at the end; a wrong row stands on top; nothing learnt changes by it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from app.jobs import row_losses as kept_losses
from app.spec import RunSettings
from tests.worker.orders import chat_rows, order, put_dataset, put_model
from worker import train
from worker.training import row_losses


def run(spec, data_dir: Path, job: str):
    return list(train.train(spec, data_dir / "runs" / job / "a1"))


@pytest.mark.long
def test_a_wrong_row_stands_on_top(data_dir: Path, tiny_model: Path) -> None:
    rows = chat_rows(24)
    for row in rows:
        row["messages"][1]["content"] = "The belly is made of spruce."
    rows[7]["messages"][1]["content"] = "zq xv jj kw qz vx wq zz"
    model, data = put_model(tiny_model), put_dataset(rows)
    spec = order(model, data, "full", epochs=8, learning_rate=5e-3, validation_fraction=0, samples=0)
    said = run(spec, data_dir, "ledger")
    path = data_dir / "runs" / "ledger" / "a1" / kept_losses.FILE
    assert path == (data_dir / said[-1].path).parent / row_losses.FILE
    found = json.loads(path.read_text())
    assert found["line"] == list(range(1, 25)) and all(count > 0 for count in found["tokens"])
    entries = [kept_losses.Entry(*row) for row in zip(found["line"], found["before"], found["after"], found["tokens"], strict=True)]
    assert kept_losses.ranked(entries, "after")[0].line == 8
    told = kept_losses.summary(entries)
    assert told["after"] < told["before"] - 0.5

    # The mean over the rows' tokens is the loss the trainer itself measures.
    total = sum(e.before * e.tokens for e in entries) / sum(e.tokens for e in entries)
    whole = order(model, data, "full", epochs=1, validation_fraction=0, samples=0).model_copy(update={"validation": data})
    first = next(event for event in run(whole, data_dir, "whole") if type(event).__name__ == "Evaluated")
    assert total == pytest.approx(first.loss, abs=2e-4)


def test_it_changes_nothing_that_is_learnt_and_can_be_left_out(data_dir: Path, tiny_model: Path) -> None:
    model, data = put_model(tiny_model), put_dataset(chat_rows())
    spec = order(model, data, "lora", epochs=2, samples=0)
    without = spec.model_copy(update={"run": spec.run.model_copy(update={"row_losses": False})})
    one, two = run(spec, data_dir, "with")[-1], run(without, data_dir, "without")[-1]
    assert one.adapter_sha256 == two.adapter_sha256
    assert not (data_dir / "runs" / "without" / "a1" / row_losses.FILE).exists()
    found = json.loads((data_dir / "runs" / "with" / "a1" / row_losses.FILE).read_text())
    held = [line for line, out in zip(found["line"], found["held_out"], strict=True) if out]
    assert held and len(held) < len(found["line"]) and sorted(found["line"]) == list(range(1, len(chat_rows()) + 1))
    assert RunSettings().row_losses
