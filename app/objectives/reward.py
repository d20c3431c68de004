"""A reward model: a head on the model gives an answer a number, which is higher for the better one of two answers to a prompt."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from app.languages import mark
from app.objectives._base import Objective
from app.objectives._settings import ObjectiveSettings


class RewardSettings(ObjectiveSettings):
    """Settings of a reward model."""

    centering: float = Field(
        0.01,
        ge=0,
        le=10,
        description=mark(
            "Weight of the squared sum of a pair's two rewards, which keeps rewards around zero: pairs alone do not say where zero is."
        ),
        json_schema_extra={"basic": True},
    )


class Reward(Objective):
    name: ClassVar = "reward"
    title: ClassVar = mark("Reward model")
    summary: ClassVar = mark("A reward model gives the chosen answer of each pair a higher number than the rejected one. Graders use it.")
    paper: ClassVar = (
        "Ouyang et al. 2022, Training language models to follow instructions with human feedback",
        "https://arxiv.org/abs/2203.02155",
    )
    place: ClassVar = 32
    method: ClassVar = "reward"
    formats: ClassVar = ("preference",)
    trains_as: ClassVar = "classification"
    heads: ClassVar = True
    result_kind: ClassVar = "reward"
    compares: ClassVar = True
    scored: ClassVar = False
    settings: ClassVar = RewardSettings
    sequences_per_row: ClassVar = 2  # a pair is its prompt with the one answer and with the other
    min_rows_per_step: ClassVar = 4
    uniform: ClassVar = True
    metrics: ClassVar = ("reward_accuracy", "loss")
    across_models: ClassVar = ("reward_accuracy",)
    loss_unit: ClassVar = mark("nats per pair")
    base_title: ClassVar = mark("Chance")
    evaluation_base_title: ClassVar = mark("Chance")
