"""Kahneman–Tversky optimization: answers rated good become likelier than the base has them, and those rated bad less likely."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, Field

from app.languages import mark
from app.objectives._base import Objective
from app.objectives._settings import ObjectiveSettings


class KTOSettings(ObjectiveSettings):
    """Settings of training on rated answers."""

    beta: float = Field(
        0.1,
        gt=0,
        le=10,
        description=mark("β, the scale of rewards: higher stays closer to the base model, lower follows the ratings further."),
        json_schema_extra={"basic": True},
    )
    desirable_weight: float | None = Field(
        None,
        title=mark("Weight of good answers"),
        gt=0,
        le=1000,
        description=mark(
            "Weight of an answer rated good. Left empty, good and bad answers weigh the same in all, however many there are of each."
        ),
    )
    undesirable_weight: float | None = Field(
        None,
        title=mark("Weight of bad answers"),
        gt=0,
        le=1000,
        description=mark("Weight of an answer rated bad. Left empty, it follows from the numbers of good and bad answers."),
    )

    def weights(self, good: int, bad: int) -> tuple[float, float]:
        """(λ_D, λ_U), the weights of a good and of a bad answer among so many of each, both above 0.

        Where one is not set, λ_D · good = λ_U · bad, the balance that the paper advises for unequal numbers (Ethayarajh et al. 2024,
        https://arxiv.org/abs/2402.01306, section 4.2: a ratio of 1 or a little above); where neither is, the commoner kind has 1.
        """
        if self.desirable_weight and self.undesirable_weight:
            return self.desirable_weight, self.undesirable_weight
        if self.desirable_weight:
            return self.desirable_weight, self.desirable_weight * good / bad
        if self.undesirable_weight:
            return self.undesirable_weight * bad / good, self.undesirable_weight
        return max(1.0, bad / good), max(1.0, good / bad)


class KTO(Objective):
    name: ClassVar = "kto"
    title: ClassVar = mark("Rated answers")
    summary: ClassVar = mark("KTO makes answers rated good likelier than the base model has them, and answers rated bad less likely.")
    paper: ClassVar = (
        "Ethayarajh et al. 2024, KTO: Model Alignment as Prospect Theoretic Optimization",
        "https://arxiv.org/abs/2402.01306",
    )
    place: ClassVar = 35
    method: ClassVar = "kto"
    formats: ClassVar = ("rated",)  # also those that were read before this objective was there
    trains_as: ClassVar = "preference"
    compares: ClassVar = True
    scored: ClassVar = False
    settings: ClassVar = KTOSettings
    beside: ClassVar = 1  # an unrelated answer after each prompt, for the KL baseline
    min_rows_per_step: ClassVar = 8  # of whose unrelated answers the baseline is the mean
    metrics: ClassVar = ("rating_accuracy", "loss")
    across_models: ClassVar = ("rating_accuracy",)
    loss_unit: ClassVar = mark("lost utility per row")

    def base_reads(self, settings: BaseModel | None) -> int:
        return 1
