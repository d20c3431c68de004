"""Direct preference optimization: of two answers to a prompt, the chosen one becomes more likely than the rejected one."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.objectives._base import Objective


class PreferenceSettings(BaseModel):
    """Settings of preference training. The descriptions are the help of the form."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    beta: float = Field(
        0.1,
        gt=0,
        le=10,
        description="KL penalty β: higher stays closer to the base model, lower follows the preferences further.",
        json_schema_extra={"basic": True},
    )
    loss: Literal["dpo", "ipo"] = Field("dpo", description="DPO has no margin target; IPO has one, which beta sets.")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="Fraction of the pairs expected to be labeled the wrong way round; DPO only."
    )
    length_normalised: bool = Field(
        False,
        title="Length normalized",
        description="Compare likelihood per token, so that long answers weigh no more than short ones. IPO always does.",
    )

    @property
    def means(self) -> bool:
        """Whether an answer's log-probability is the mean over its tokens rather than the sum."""
        return self.length_normalised or self.loss == "ipo"


class DPO(Objective):
    name: ClassVar = "preference"
    title: ClassVar = "Preference"
    summary: ClassVar = (
        "Preference training makes the chosen answer of each pair likelier than the rejected one, relative to the base model."
    )
    paper: ClassVar = ("Rafailov et al. 2023, Direct Preference Optimization", "https://arxiv.org/abs/2305.18290")
    place: ClassVar = 30
    method: ClassVar = "dpo"
    compares: ClassVar = True
    scored: ClassVar = False
    settings: ClassVar = PreferenceSettings
    sequences_per_row: ClassVar = 2  # a pair is its prompt with the one answer and with the other
    reads_base: ClassVar = True
    uniform: ClassVar = True
    metrics: ClassVar = ("reward_accuracy", "loss")
    loss_unit: ClassVar = "nats per pair"
    loss_per: ClassVar = "pair"
