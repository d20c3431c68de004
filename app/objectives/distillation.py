"""On-policy distillation: the student draws answers, and becomes as likely to write each of their tokens as a teacher is."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from app.languages import mark
from app.objectives._base import Objective
from app.objectives._drawn import DRAWN_FORMATS, DrawnSettings


class DistillationSettings(DrawnSettings):
    """Settings of on-policy distillation."""

    teacher: str = Field("", max_length=300, description=mark("The model to distill, one of this studio with the same vocabulary."))
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = Field(
        "reverse_kl",
        description=mark(
            "Reverse KL avoids what the teacher would not write, forward KL covers all that it might, and the Jensen–Shannon divergence "
            "is between them."
        ),
        json_schema_extra={
            "basic": True,
            "words": {"reverse_kl": mark("Reverse KL"), "forward_kl": mark("Forward KL"), "jsd": mark("Jensen–Shannon")},
        },
    )
    group_size: int = Field(1, ge=1, le=64, description=mark("Answers drawn for each prompt."), json_schema_extra={"basic": True})


class Distillation(Objective):
    name: ClassVar = "distillation"
    title: ClassVar = mark("Distillation")
    summary: ClassVar = mark(
        "On-policy distillation lets the model answer prompts, and brings its probabilities of each token of its answers to those of a teacher."
    )
    paper: ClassVar = (
        "Agarwal et al. 2023, On-Policy Distillation of Language Models",
        "https://arxiv.org/abs/2306.13649",
    )
    place: ClassVar = 45
    method: ClassVar = "distillation"
    formats: ClassVar = DRAWN_FORMATS
    trains_as: ClassVar = "generation"
    draws: ClassVar = True
    teaches: ClassVar = True
    settings: ClassVar = DistillationSettings
    graded: ClassVar = True
    metrics: ClassVar = ("loss",)
    loss_unit: ClassVar = mark("nats per token, from the teacher")
