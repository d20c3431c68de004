"""BitFit: only the biases are trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from app.languages import gettext, mark
from app.shapes import Shape
from app.strategies._base import Kept
from app.strategies._model import blocks
from app.strategies._selected import Selected

if TYPE_CHECKING:
    import torch


class BitFit(Selected):
    name: Literal["bitfit"] = "bitfit"
    title: ClassVar = "BitFit"
    family: ClassVar = "selective"
    summary: ClassVar = mark("Trains only the biases, about 0.1% of the model.")
    when_to_use: ClassVar = mark("For encoders and small labeled sets, when the result must be tiny and forget almost nothing.")
    paper: ClassVar = (
        "Ben Zaken et al. 2021, BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models",
        "https://arxiv.org/abs/2106.10199",
    )
    place: ClassVar = 52
    unsuited: ClassVar = ("many rows", "far data")
    default_learning_rate: ClassVar = 1e-3

    def trainable(self, shape: Shape) -> int:
        return shape.biases()

    def unavailable(self, shape: Shape, *, task: str = "generation", cuda: bool = False) -> str | None:
        if self.trainable(shape) == 0:
            return gettext("This model has no biases to learn. Choose Norm tuning or (IA)³, which are as small.")
        return super().unavailable(shape, task=task, cuda=cuda)

    def activation_counts(self, shape: Shape) -> Kept:
        return Kept(0)

    @classmethod
    def drawing(cls) -> dict[str, Any]:
        return {"layers": ["frozen"] * 6, "inside": True}

    def chosen(self, model: torch.nn.Module) -> list[str]:
        inside = {id(parameter) for block in blocks(model) for parameter in block.parameters()}
        return [name for name, weight in model.named_parameters() if name.endswith("bias") and id(weight) in inside]
