"""Every objective has both of its files, and what it says fits the rest of the studio."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest

from app import formats, objectives
from app.datasets import service as datasets
from app.evaluation.comparison_table import score_columns
from app.formats import FORMATS
from app.metrics import METRICS
from app.objectives import METHODS, OBJECTIVES, Objective
from app.settings import PROJECT
from app.strategies import STRATEGIES
from app.tables import Dataset
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
    assert [name for name in FORMATS if not formats.objectives_of(name)] == []


def test_rows_before_they_are_read_are_of_the_default():
    assert objectives.get(None) is OBJECTIVES[objectives.DEFAULT]
    with pytest.raises(KeyError):
        objectives.get("bogus")


class Ratings(Objective):
    name: ClassVar = "ratings"
    title: ClassVar = "Ratings"
    summary: ClassVar = "Learns which answers are good."
    method: ClassVar = "kto"
    formats: ClassVar = ("rated",)
    trains_as: ClassVar = "preference"
    compares: ClassVar = True


def test_a_new_objective_is_known_everywhere_by_being_there(monkeypatch):
    """What a file in app/objectives would do, done to the registry."""
    lora, features = STRATEGIES["lora"], STRATEGIES["feature_extraction"]
    with pytest.raises(KeyError):
        lora.unsupported("ratings")
    monkeypatch.setitem(OBJECTIVES, "ratings", Ratings())
    assert [entry.name for entry in formats.objectives_of("rated")] == ["kto", "ratings"]
    assert [entry.name for entry in formats.objectives_of("preference")] == ["preference", "reward"]
    assert lora.unsupported("ratings") is None and "does not support the task ratings" in str(features.unsupported("ratings"))
    assert lora.learning_rate_for("ratings") == lora.learning_rate_for("preference") < lora.learning_rate_for("generation")


def test_rated_rows_of_an_older_studio_are_for_kto():
    """It read them as rows for preferences, which nothing trained on as they were."""
    older = Dataset(format="rated", task="preference", good_rows=3)
    assert datasets.trainable(older) and datasets.usual_task(older) == "kto"
