"""Preference optimization on pairs: of two answers to a prompt, the chosen one becomes more likely than the rejected one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, Field, ValidationInfo, field_validator, model_validator

from app.languages import mark
from app.objectives._base import Objective
from app.objectives._settings import ObjectiveSettings


class PairLoss(NamedTuple):
    """What a loss of pairs takes; `worker/training/objectives/dpo.py:losses_of` computes it."""

    usual: Mapping[str, float]  # its settings with their defaults
    reads_base: bool = True  # whether an answer's reward is measured from the model before fine-tuning
    means: bool = False  # whether an answer's log-probability is the mean over its tokens rather than the sum
    normalizes: bool = False  # whether `length_normalised` chooses between the two


LOSSES: dict[str, PairLoss] = {
    "dpo": PairLoss({"beta": 0.1, "label_smoothing": 0.0}, normalizes=True),
    "ipo": PairLoss({"beta": 0.1}, means=True),
    "robust_dpo": PairLoss({"beta": 0.1, "label_smoothing": 0.1}, normalizes=True),
    "orpo": PairLoss({"beta": 0.1}, reads_base=False, means=True),
    "simpo": PairLoss({"beta": 2.0, "gamma": 1.0}, reads_base=False, means=True),
    "cpo": PairLoss({"beta": 0.1, "nll_weight": 1.0}, reads_base=False),
}
"""Every loss of pairs. The defaults are those of the papers."""


class PreferenceSettings(ObjectiveSettings):
    """Settings of preference training. A setting that is omitted takes the default of the loss."""

    derived: ClassVar = ("beta", "gamma", "nll_weight", "label_smoothing")

    beta: float = Field(
        0.1,
        gt=0,
        le=10,
        description=mark(
            "β, the scale of rewards. With DPO higher stays closer to the base model; for ORPO it is the weight of the odds ratio."
        ),
        json_schema_extra={"basic": True},
    )
    loss: Literal["dpo", "ipo", "robust_dpo", "orpo", "simpo", "cpo"] = Field(
        "dpo",
        description=mark(
            "DPO, IPO and robust DPO measure from the base model; ORPO, SimPO and CPO do not, which saves reading it. IPO has a "
            "target margin, robust DPO expects wrong labels, ORPO and CPO add the cross-entropy of the chosen answer, and SimPO compares means over tokens."
        ),
        json_schema_extra={
            "basic": True,
            "words": {
                "dpo": "DPO",
                "ipo": "IPO",
                "robust_dpo": mark("Robust DPO"),
                "orpo": "ORPO",
                "simpo": "SimPO",
                "cpo": "CPO",
            },
        },
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description=mark("Fraction of the pairs expected to be labeled the wrong way round; DPO and robust DPO only.")
    )
    length_normalised: bool = Field(
        False,
        title=mark("Length normalized"),
        description=mark(
            "Compare likelihood per token, so that long answers weigh no more than short ones; DPO and robust DPO only. IPO, ORPO and "
            "SimPO always do."
        ),
    )
    gamma: float | None = Field(
        None,
        ge=0,
        le=20,
        description=mark("Target margin γ between the rewards of the two answers; SimPO only."),
        json_schema_extra={"basic": True},
        exclude_if=lambda value: value is None,
    )
    nll_weight: float | None = Field(
        None,
        title=mark("Weight of the chosen answer's loss"),
        ge=0,
        le=10,
        description=mark("Weight of the cross-entropy of the chosen answer, per token; CPO only."),
        exclude_if=lambda value: value is None,
    )

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, given: Any) -> Any:
        """The defaults of the loss for settings that are omitted or null."""
        if not isinstance(given, dict):
            return given
        given = {name: value for name, value in given.items() if value is not None or name not in cls.model_fields}
        loss = given.get("loss", "dpo")
        return {**LOSSES[loss].usual, **given} if isinstance(loss, str) and loss in LOSSES else given

    @field_validator("label_smoothing")
    @classmethod
    def _expects_some(cls, value: float, info: ValidationInfo) -> float:
        if value == 0 and info.data.get("loss") == "robust_dpo":
            raise ValueError("robust DPO is DPO where no label is wrong: give a fraction above 0, or take the loss dpo")
        return value

    @property
    def means(self) -> bool:
        """Whether an answer's log-probability is the mean over its tokens rather than the sum."""
        return self.length_normalised or LOSSES[self.loss].means

    @property
    def reads_base(self) -> bool:
        """Whether rewards are measured from the model before fine-tuning, which then reads every pair once."""
        return LOSSES[self.loss].reads_base

    def unused(self) -> tuple[str, ...]:
        kind = LOSSES.get(self.loss, LOSSES["dpo"])
        return tuple(name for name in self.derived if name not in kind.usual) + (() if kind.normalizes else ("length_normalised",))

    def usual(self) -> Mapping[str, Any]:
        return LOSSES.get(self.loss, LOSSES["dpo"]).usual


class DPO(Objective):
    name: ClassVar = "preference"
    title: ClassVar = mark("Preference")
    summary: ClassVar = mark("Preference training makes the chosen answer of each pair likelier than the rejected one.")
    paper: ClassVar = ("Rafailov et al. 2023, Direct Preference Optimization", "https://arxiv.org/abs/2305.18290")
    place: ClassVar = 30
    method: ClassVar = "dpo"
    compares: ClassVar = True
    scored: ClassVar = False
    settings: ClassVar = PreferenceSettings
    sequences_per_row: ClassVar = 2  # a pair is its prompt with the one answer and with the other
    uniform: ClassVar = True
    metrics: ClassVar = ("reward_accuracy", "loss")
    across_models: ClassVar = ("reward_accuracy",)
    loss_unit: ClassVar = mark("nats per pair")

    def base_reads(self, settings: BaseModel | None) -> int:
        return int(not isinstance(settings, PreferenceSettings) or settings.reads_base)
