"""LoRA whose model's own biases may learn beside it, as peft's setting `bias` says: on a base whose weights are numbers as they are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from app.shapes import Shape
from app.strategies._chosen import ChosenLowRank
from app.strategies._low_rank import InOnePass
from app.strategies._selected import match_norms

if TYPE_CHECKING:
    import torch


class WithBiases(InOnePass, ChosenLowRank):
    bias: Literal["none", "all", "lora_only"] = Field(
        "none",
        description="Biases of the model itself that are trained besides: none, all of them, or those of the layers that LoRA is on. Many "
        "decoders have none.",
        exclude_if=lambda kind: kind == "none",
    )

    def joins(self) -> bool:
        return super().joins() and self.bias == "none"  # with biases that learn, the layers are peft's own

    def biases(self, shape: Shape) -> int:
        """How many numbers of the model's biases learn."""
        if self.bias == "none":
            return 0
        if self.bias == "lora_only":
            return sum(x.outputs for x in self.chosen(shape) if x.bias)
        norms = (shape.layers * shape.norms_per_layer + 1) * shape.hidden if shape.norm_bias else 0
        return norms + sum(x.outputs for x in shape.each_linear() if x.bias)

    def trainable(self, shape: Shape) -> int:
        return super().trainable(shape) + self.biases(shape)

    def variant(self) -> dict[str, Any]:
        return {**super().variant(), "bias": self.bias}

    def attach(self, model: torch.nn.Module, *, task: str = "generation", labels: int = 0) -> torch.nn.Module:
        attached = super().attach(model, task=task, labels=labels)
        if self.bias != "none":
            for parameter in attached.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()  # in bf16 a step would be smaller than the last digit, and lost
            match_norms(attached)
        return attached

    def load(self, model: torch.nn.Module, folder: Path) -> torch.nn.Module:
        import torch

        for module, bias in _biases(model).items() if self.bias != "none" else ():  # peft writes into them, and siblings may share them
            module.bias = torch.nn.Parameter(bias.detach().clone(), requires_grad=False)
        return super().load(model, folder)

    def load_blended(self, model: torch.nn.Module, folder: Path, share: float) -> torch.nn.Module:
        before = _biases(model)
        loaded = super().load_blended(model, folder, share)
        for module, bias in before.items():
            if module.bias is not bias:
                module.bias.data = bias.data + share * (module.bias.data - bias.data)
        return loaded


def _biases(model: torch.nn.Module) -> dict[torch.nn.Module, torch.nn.Parameter]:
    return {module: bias for module in model.modules() if (bias := module._parameters.get("bias")) is not None}
