"""LayerNorm tuning: only the norms are trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from app.languages import mark
from app.shapes import Shape
from app.strategies._base import Kept
from app.strategies._model import norms_of, structure_of
from app.strategies._selected import Selected

if TYPE_CHECKING:
    import torch


class LayerNorm(Selected):
    name: Literal["layer_norm"] = "layer_norm"
    title: ClassVar = mark("Norm tuning")
    family: ClassVar = "selective"
    summary: ClassVar = mark("Trains only the norm gains between the layers.")
    when_to_use: ClassVar = mark("When a change of tone or format is enough and the result must be a few hundred kilobytes.")
    paper: ClassVar = (
        "Zhao et al. 2023, Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning",
        "https://arxiv.org/abs/2312.11420",
    )
    place: ClassVar = 51
    suits: ClassVar = ("few rows", "close data", "solved")
    unsuited: ClassVar = ("many rows", "far data")
    default_learning_rate: ClassVar = 3e-3

    def trainable(self, shape: Shape) -> int:
        return shape.norm_parameters()

    def activation_counts(self, shape: Shape) -> Kept:
        return Kept(0)  # a norm's own gradient needs what every gradient passing through needs

    @classmethod
    def drawing(cls) -> dict[str, Any]:
        return {"layers": ["frozen"] * 6, "inside": True}

    def chosen(self, model: torch.nn.Module) -> list[str]:
        found = [name for name, _ in model.named_parameters() if "norm" in name.rsplit(".", 2)[-2].lower()]
        if not structure_of(model):
            return found
        norms = {id(weight) for module in norms_of(model) for weight in module.parameters(recurse=False)}
        return [name for name, weight in model.named_parameters() if id(weight) in norms]
