"""The form of every class that has one, and what comes back from it."""

from __future__ import annotations

from typing import Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field

from app.kit.forms import as_text, controls, explain, fill
from app.spec import RunSettings
from app.strategies import STRATEGIES

CLASSES = {"run": RunSettings, **STRATEGIES}


class Everything(BaseModel):
    """One field of every kind that a strategy may declare."""

    model_config = ConfigDict(extra="forbid")
    name: Literal["everything"] = "everything"
    whole: int = Field(3, gt=0, lt=10, description="A whole number.")
    broken: float = Field(0.5, ge=0, lt=1, description="A broken one.", json_schema_extra={"basic": True, "unit": "tokens"})
    pick: Literal["a", "b"] = Field("a", description="One of two.")
    yes: bool = Field(True, description="Or no.")
    maybe: int | None = Field(None, ge=1, description="Or nothing.")
    rather: Literal["x", "y"] | None = Field(None, description="One, or nothing.")
    words: str = Field("", title="Some words", description="Words.")


def by_name(found):
    return {c.name: c for c in found}


def test_each_type_gets_its_widget_and_its_bounds():
    found = by_name(controls(Everything, "s"))
    assert "name" not in found
    assert {n: c.widget for n, c in found.items()} == {
        "whole": "number", "broken": "number", "pick": "select", "yes": "checkbox", "maybe": "number", "rather": "select", "words": "text",
    }  # fmt: skip
    assert (found["whole"].minimum, found["whole"].maximum, found["whole"].step) == ("1", "9", "1")
    assert (found["broken"].minimum, found["broken"].maximum, found["broken"].step, found["broken"].unit) == ("0", "1", "any", "tokens")
    assert found["rather"].choices == ("", "x", "y")
    assert (found["words"].label, found["maybe"].value) == ("Some words", "")


@pytest.mark.parametrize("name", CLASSES)
def test_every_setting_has_help_and_a_place(name):
    for control in controls(CLASSES[name], "s"):
        assert control.help.endswith((".", "?")), f"{name}.{control.name} has no sentence of help"
        assert control.label[0].isupper()


@pytest.mark.parametrize("name", CLASSES)
def test_a_form_sent_back_untouched_gives_the_defaults(name):
    cls = CLASSES[name]
    filled = fill(cls, {c.key: c.value for c in controls(cls, "s")}, "s")
    assert filled.errors == {}
    assert cls.model_validate(filled.settings) == cls()


def test_empty_means_the_default_and_spaces_are_trimmed():
    assert fill(RunSettings, {"run.epochs": "", "run.seed": " 7 "}, "run").settings == {"seed": 7}


def test_the_rest_of_the_form_is_another_class_matter():
    assert fill(RunSettings, {"strategy.rank": "8", "model": "m"}, "run").settings == {}


@pytest.mark.parametrize(
    ("field", "typed", "sentence"),
    [
        ("rank", "0", "Rank must be 1 or more; you wrote 0."),
        ("rank", "1025", "Rank must be 1024 or less; you wrote 1025."),
        ("rank", "eight", "Rank takes a whole number; you wrote eight."),
        ("rank", "8.5", "Rank takes a whole number; you wrote 8.5."),
        ("alpha", "0", "Alpha must be more than 0; you wrote 0."),
        ("dropout", "1", "Dropout must be less than 1; you wrote 1."),
        ("dropout", "nan", "Dropout takes a number; you wrote nan."),
        ("layers", "all", "Layers is one of all-linear, attention, feed-forward; you wrote all."),
        (
            "width",
            "3",
            "There is no setting 'width'. There is: rank, alpha, dropout, layers, target_modules, init_lora_weights, loraplus_lr_ratio, bias, modules_to_save.",
        ),
    ],
)
def test_an_error_stands_beside_its_field_and_the_value_is_kept(field, typed, sentence):
    filled = fill(STRATEGIES["lora"], {"strategy.alpha": "32", f"strategy.{field}": typed}, "strategy")
    assert filled.errors == {field: sentence}
    assert filled.typed[field] == typed
    shown = by_name(controls(STRATEGIES["lora"], "strategy", typed=filled.typed, errors=filled.errors))
    if field in shown:
        assert (shown[field].value, shown[field].error) == (typed, sentence)


def test_small_numbers_are_written_out():
    assert [as_text(value) for value in (5e-05, 0.1, 1e-8, 2.0, 1.5)] == ["0.00005", "0.1", "1e-08", "2", "1.5"]


def test_every_wrong_field_is_named_at_once():
    assert set(fill(STRATEGIES["lora"], {"s.rank": "0", "s.dropout": "2"}, "s").errors) == {"rank", "dropout"}


@settings(suppress_health_check=[HealthCheck.too_slow])  # of a busy machine
@given(st.dictionaries(st.sampled_from([f"s.{n}" for n in Everything.model_fields]), st.text(max_size=20)))
def test_no_text_makes_filling_a_form_fail(data):
    filled = fill(Everything, data, "s")
    assert all(sentence.endswith(".") for sentence in filled.errors.values())
    assert filled.errors or Everything.model_validate(filled.settings)


def test_an_error_pydantic_invents_tomorrow_still_reads_as_one():
    error = {"loc": ("whole",), "type": "something_new", "msg": "Input is odd", "input": "7"}
    assert explain(Everything, error) == "Whole: Input is odd; you wrote 7."


def test_a_field_at_its_default_gives_way_to_the_one_that_says_the_same():
    untouched = {c.key: c.value for c in controls(RunSettings, "run")}
    filled = fill(RunSettings, {**untouched, "run.warmup_steps": "20"}, "run")
    assert filled.errors == {} and filled.settings == {"warmup_steps": 20}
    both = fill(RunSettings, {**untouched, "run.warmup_steps": "20", "run.warmup_fraction": "0.2"}, "run")
    assert both.errors == {"warmup_steps": "Warmup steps: It means the same as warmup_fraction, which was given too: omit one of the two."}
