"""LoRA with trained weights of the model itself in addition, as peft's settings `bias` and `modules_to_save` say: on an
unquantized base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from pydantic import Field, field_validator

from app.languages import gettext, mark
from app.shapes import Shape
from app.strategies._chosen import ChosenLowRank, ModuleNames, names_in
from app.strategies._low_rank import InOnePass
from app.strategies._selected import match_norms

if TYPE_CHECKING:
    import torch


TABLES = ("embed_tokens", "lm_head")


class WithOwnWeights(InOnePass, ChosenLowRank):
    bias: Literal["none", "all", "lora_only"] = Field(
        "none",
        description=mark(
            "Biases of the model itself that are trained besides: none, all of them, or those of the layers that LoRA is on. Many "
            "decoders have none."
        ),
        exclude_if=lambda kind: kind == "none",
    )

    modules_to_save: ModuleNames | None = Field(
        None,
        min_length=1,
        max_length=200,
        description=mark(
            "Tables of words that are trained whole and saved with the adapter: embed_tokens, lm_head. For new words or tags; they are "
            "large. A model that has one table for both trains that."
        ),
        exclude_if=lambda names: names is None,
    )

    @field_validator("modules_to_save")
    @classmethod
    def _are_tables(cls, value: str | None) -> str | None:
        if value is not None and (not names_in(value) or any(name not in TABLES for name in names_in(value))):
            raise ValueError(f"It takes {' and '.join(TABLES)}; for whole layers of the blocks choose full tuning, or the top layers")
        return value

    def joins(self) -> bool:
        return super().joins() and self.bias == "none"  # with trained biases, the layers are peft's own

    def biases(self, shape: Shape) -> int:
        """Number of trained bias parameters."""
        if self.bias == "none":
            return 0
        if self.bias == "lora_only":
            return sum(x.outputs for x in self.chosen(shape) if x.bias)
        norms = (shape.layers * shape.norms_per_layer + 1) * shape.hidden if shape.norm_bias else 0
        return norms + sum(x.outputs for x in shape.each_linear() if x.bias)

    def tables(self, shape: Shape) -> int:
        kinds = set(names_in(self.modules_to_save))
        return min(len(kinds), 1 if shape.tied else 2) * shape.vocabulary * shape.hidden

    def trainable(self, shape: Shape) -> int:
        return super().trainable(shape) + self.biases(shape) + self.tables(shape)

    def saved(self, shape: Shape) -> dict[str, Any]:
        if self.modules_to_save is None:
            return {}
        if shape.tied:  # peft trains the one embedding where it is read, and ties the head to it
            return {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
        return {"modules_to_save": sorted(set(names_in(self.modules_to_save)))}

    def unavailable(self, shape: Shape, *, task: str = "generation", cuda: bool = False) -> str | None:
        if self.modules_to_save is not None and shape.structure:
            return gettext("The embeddings of a %(model)s have other names. Leave modules_to_save empty.", model=shape.model_type)
        return super().unavailable(shape, task=task, cuda=cuda)

    def variant(self) -> dict[str, Any]:
        return {**super().variant(), "bias": self.bias}

    def attach(self, model: torch.nn.Module, *, task: str = "generation", labels: int = 0) -> torch.nn.Module:
        attached = super().attach(model, task=task, labels=labels)
        if self.bias != "none" or self.modules_to_save:
            for parameter in attached.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()  # in bf16 an update would be below the last bit, and lost
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
            own = cast("torch.nn.Linear", module).bias
            if own is not bias:
                own.data = bias.data + share * (own.data - bias.data)
        tables = [module for module in loaded.modules() if hasattr(module, "original_module")]
        pairs = {
            cast("torch.nn.Linear", table).weight: cast("torch.nn.Linear", table.original_module).weight for table in tables
        }  # a tied one is there once
        for trained, weight in pairs.items():
            trained.data = weight.data + share * (trained.data - weight.data)
        return loaded


def _biases(model: torch.nn.Module) -> dict[torch.nn.Module, torch.nn.Parameter]:
    return {module: bias for module in model.modules() if (bias := module._parameters.get("bias")) is not None}
