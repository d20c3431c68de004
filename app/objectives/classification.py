"""Classification: a head on the model predicts the label of each text."""

from __future__ import annotations

from typing import ClassVar

from app.languages import mark
from app.objectives._base import Objective


class Classification(Objective):
    name: ClassVar = "classification"
    title: ClassVar = mark("Classification")
    summary: ClassVar = mark("Classification learns which label a text has.")
    place: ClassVar = 20
    model_kinds: ClassVar = ("encoder", "instruction", "dialogue", "generic")
    classifies: ClassVar = True
    heads: ClassVar = True
    result_kind: ClassVar = "classifier"
    uniform: ClassVar = True
    min_rows_per_step: ClassVar = 8
    rows_per_step: ClassVar = 32  # one label is trained per text: a step of as many tokens as for answers would hold hundreds of them
    min_step_tokens: ClassVar = 64
    metrics: ClassVar = ("accuracy", "macro_f1", "loss")
    loss_unit: ClassVar = mark("nats per row")
    base_title: ClassVar = mark("Prior baseline")
    evaluation_base_title: ClassVar = mark("Majority baseline")
    unfair: ClassVar = ("calibration_error",)  # always answering with the label frequencies is never overconfident
