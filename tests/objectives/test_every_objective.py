"""Every objective has both of its files, and what it says fits the rest of the studio."""

from __future__ import annotations

from pathlib import Path

import pytest

from app import formats, objectives
from app.evaluation.comparison_table import score_columns
from app.formats import FORMATS
from app.metrics import METRICS
from app.objectives import METHODS, OBJECTIVES
from app.settings import PROJECT
from app.strategies import STRATEGIES
from worker.training.objectives import class_of


def files(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.py") if not path.name.startswith("_")}


def test_both_folders_hold_the_same_files():
    assert files(PROJECT / "app" / "objectives") == files(PROJECT / "worker" / "training" / "objectives")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_is_whole(name):
    entry = OBJECTIVES[name]
    assert entry.title and entry.summary.endswith(".") and entry.method in METHODS
    assert set(entry.formats) <= set(FORMATS)
    assert entry.metrics and set(entry.metrics) <= set(METRICS) and set(entry.unfair) <= set(METRICS)
    assert [column.key for column in score_columns(name)] == list(entry.metrics)
    assert any(cls.unsupported(name) is None for cls in STRATEGIES.values()), "no strategy trains it"
    assert any(entry in formats.objectives_of(one) for one in FORMATS), "no format has rows for it"
    computes = class_of(name)
    assert computes.__module__.rpartition(".")[2] == type(entry).__module__.rpartition(".")[2]
    assert computes.accuracy in METRICS or computes.accuracy == "accuracy"


def test_every_format_has_an_objective():
    assert {entry.task for entry in FORMATS.values()} <= set(OBJECTIVES)
    assert [name for name in FORMATS if not formats.objectives_of(name)] == ["rated"]


def test_rows_before_they_are_read_are_of_the_default():
    assert objectives.get(None) is OBJECTIVES[objectives.DEFAULT]
    with pytest.raises(KeyError):
        objectives.get("bogus")
