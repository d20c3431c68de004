"""Rank-stabilized LoRA: the correction is scaled by alpha / √rank, so that larger ranks keep improving the result."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from app.languages import mark
from app.strategies._advice import LORA_VARIANT
from app.strategies._own_weights import WithOwnWeights


class RankStabilizedLora(WithOwnWeights):
    name: Literal["rslora"] = "rslora"
    title: ClassVar = mark("Rank-stabilized LoRA")
    summary: ClassVar = mark("LoRA scaled by alpha/√r, so that high ranks stay effective.")
    when_to_use: ClassVar = mark("When you have much data and want a rank of 32 or more: plain LoRA trains ever more slowly there.")
    paper: ClassVar = (
        "Kalajdzievski 2023, A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA",
        "https://arxiv.org/abs/2312.03732",
    )
    place: ClassVar = 11
    plain_lora: ClassVar = True
    suits: ClassVar = ("many rows", "far data")
    standing: ClassVar = LORA_VARIANT
    takes_fp8: ClassVar = True

    rank: int = Field(
        32, ge=1, le=1024, description=mark("Width of the correction; here large ranks pay."), json_schema_extra={"basic": True}
    )
    alpha: float = Field(16, gt=0, le=4096, description=mark("Strength of the correction: it is scaled by alpha / √rank."))

    def variant(self) -> dict[str, Any]:
        return {**super().variant(), "use_rslora": True}
