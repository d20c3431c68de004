"""DoRA: the magnitude of each weight row is trained separately from its direction, which LoRA changes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from app.languages import mark
from app.shapes import Shape
from app.strategies._advice import LORA_VARIANT
from app.strategies._base import Kept
from app.strategies._own_weights import WithOwnWeights

if TYPE_CHECKING:
    import torch
    from peft.tuners.lora import LoraLayer


class Dora(WithOwnWeights):
    name: Literal["dora"] = "dora"
    title: ClassVar = "DoRA"
    summary: ClassVar = mark("LoRA for the direction of each weight row, plus a trained magnitude.")
    when_to_use: ClassVar = mark("When LoRA at a small rank is not quite good enough and slower training is acceptable.")
    paper: ClassVar = ("Liu et al. 2024, DoRA: Weight-Decomposed Low-Rank Adaptation", "https://arxiv.org/abs/2402.09353")
    place: ClassVar = 12
    suits: ClassVar = ("many rows",)
    standing: ClassVar = LORA_VARIANT
    arithmetic: ClassVar = 2

    def activation_counts(self, shape: Shape) -> Kept:
        plain = super().activation_counts(shape).per_token
        if not self.joins():  # each layer's output before and after scaling; the norms pass no gradient (the paper, section 4.3)
            return Kept(plain + 2 * shape.layer_outputs())
        # The scaled output only; that of a feed-forward's first layers is kept in any case.
        return Kept(plain + shape.layer_outputs() - (2 if shape.gated else 1) * shape.intermediate)

    def trainable(self, shape: Shape) -> int:
        return super().trainable(shape) + sum(x.outputs for x in self.chosen(shape))

    def variant(self) -> dict[str, Any]:
        return {**super().variant(), "use_dora": True}

    def load_blended(self, model: torch.nn.Module, folder: Path, share: float) -> torch.nn.Module:
        import torch

        loaded = super().load_blended(model, folder, share)
        for module in loaded.modules():
            for length in getattr(module, "lora_magnitude_vector", {}).values():
                weight = cast("torch.nn.Linear", cast("LoraLayer", module).get_base_layer()).weight
                start = torch.linalg.norm(weight.float(), dim=1).to(length.weight)
                length.weight.data = start + share * (length.weight.data - start)
        return loaded
