"""Shared parts of LoRA and its variants: the settings, the choice of layers and the parameter count."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from app.languages import mark
from app.shapes import Linear, Shape, shape_of
from app.strategies._base import Kept
from app.strategies._model import transformer
from app.strategies._peft import PeftStrategy

if TYPE_CHECKING:
    import torch

LayerChoice = Literal["all-linear", "attention", "feed-forward"]
JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of a block that read the same input and share a product in `worker/kernels/cpu/shared_projection.py`."""
_FEED_FORWARD_PARTS = ("mlp", "ffn", "feed_forward", "moe", "block_sparse_moe", "shared_expert", "fc", "dense_h_to", "dense_4h_to")
_FEED_FORWARD = ("gate_proj", "up_proj", "down_proj", "intermediate.dense", "output.dense")


def linear_names(shape: Shape, layers: LayerChoice) -> list[str]:
    """Name suffixes of the chosen linear layers of every block."""
    names = [linear.name for linear in shape.linears()]
    if layers == "all-linear":
        return names
    return [name for name in names if _in_feed_forward(name) == (layers == "feed-forward")]


def _in_feed_forward(name: str) -> bool:
    """By the name of the layer, or of the module that it is in where the structure was read from the model."""
    parts = name.split(".")
    return name in _FEED_FORWARD or any(part.startswith(_FEED_FORWARD_PARTS) for part in parts)


def peft_targets(shape: Shape, layers: LayerChoice) -> list[str] | str:
    """`target_modules` for peft: a list of name suffixes, or a pattern over whole names.

    An encoder's attention ends in a layer with the same suffix as its feed-forward's, so there only a pattern distinguishes them.
    """
    names = linear_names(shape, layers)
    if shape.architecture == "encoder" and layers == "feed-forward":
        stack = rf"(.*\.)?{re.escape(shape.structure.stack)}" if shape.structure else ".*layer"
        return rf"{stack}\.\d+\.({'|'.join(re.escape(name) for name in names)})"
    return names


class InOnePass:
    """Mixin for a strategy whose layers `worker/modeling/fused_lora.py` or `worker/modeling/fused_vera.py` computes, so that it
    can also train in bf16."""

    dropout: float

    def joins(self) -> bool:
        return not self.dropout  # with dropout, the layers are peft's own

    def trains_in_bf16(self) -> bool:
        return self.joins()


class LowRank(PeftStrategy):
    family: ClassVar = "reparametrized"
    tasks: ClassVar = ("generation", "classification", "preference")
    merges: ClassVar = True
    blends: ClassVar = True
    scaled: ClassVar[tuple[str, ...]] = (".lora_B.",)
    default_learning_rate: ClassVar = 5e-4

    rank: int = Field(
        8, ge=1, le=1024, description=mark("LoRA rank r. Higher = more capacity and memory."), json_schema_extra={"basic": True}
    )
    alpha: float = Field(16, gt=0, le=4096, description=mark("LoRA alpha (scale = alpha/r)."))
    dropout: float = Field(0.0, ge=0, lt=1, description=mark("Fraction of the adapter's inputs dropped at random during training."))
    layers: LayerChoice = Field("all-linear", description=mark("Which linear layers are adapted. Target modules name single ones."))

    def targets(self, shape: Shape) -> list[str]:
        return linear_names(shape, self.layers)

    def chosen(self, shape: Shape) -> list[Linear]:
        """Every layer that gets a correction, over all blocks."""
        targets = set(self.targets(shape))
        return [x for x in shape.each_linear() if x.name in targets]

    def peft_targets(self, shape: Shape) -> list[str] | str:
        return peft_targets(shape, self.layers)

    def trainable(self, shape: Shape) -> int:
        return sum(self.rank * (x.inputs + x.outputs) for x in self.chosen(shape))

    def activation_counts(self, shape: Shape) -> Kept:
        return Kept(shape.layer_inputs() + self.rank * len(self.targets(shape)))

    @classmethod
    def drawing(cls) -> dict[str, Any]:
        return {"layers": ["frozen"] * 6, "beside": True}

    def variant(self) -> dict[str, Any]:
        """Arguments of `peft.LoraConfig` that select this variant."""
        return {}

    def saved(self, shape: Shape) -> dict[str, Any]:
        """Arguments for modules that are trained and saved whole."""
        return {}

    def config(self, model: torch.nn.Module, *, task: str) -> Any:
        from peft import LoraConfig

        shape = shape_of(transformer(model).config.to_dict())
        return LoraConfig(
            task_type=self.task_type(task),
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # peft divides by the rank, and takes any number
            lora_dropout=self.dropout,
            target_modules=self.peft_targets(shape),
            **self.variant(),
            **self.saved(shape),
        )
