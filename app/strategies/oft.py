"""OFT: each weight is multiplied, block by block, by a trained orthogonal matrix (a rotation), which preserves norms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from app.languages import mark
from app.shapes import Shape, shape_of
from app.strategies._base import Kept
from app.strategies._low_rank import LayerChoice, linear_names, peft_targets
from app.strategies._model import transformer
from app.strategies._peft import PeftStrategy

if TYPE_CHECKING:
    import torch


class Oft(PeftStrategy):
    name: Literal["oft"] = "oft"
    title: ClassVar = "OFT"
    family: ClassVar = "reparametrized"
    tasks: ClassVar = ("generation", "classification", "preference")
    summary: ClassVar = mark("Orthogonal rotation of weights, which preserves the geometry of what the model knows.")
    when_to_use: ClassVar = mark("When forgetting is the worry. It is slower than LoRA at every step.")
    paper: ClassVar = ("Qiu et al. 2023, Controlling Text-to-Image Diffusion by Orthogonal Finetuning", "https://arxiv.org/abs/2306.07280")
    place: ClassVar = 18
    merges: ClassVar = True
    blends: ClassVar = True
    scaled: ClassVar = (".oft_R.",)  # the generator of the rotation: half of it rotates half as far
    default_learning_rate: ClassVar = 1e-3

    block: int = Field(
        32,
        ge=2,
        le=1024,
        description=mark("Block size of the rotations. Higher = more capacity and memory."),
        json_schema_extra={"basic": True},
    )
    layers: LayerChoice = Field("all-linear", description=mark("Which linear layers are rotated (target modules)."))
    dropout: float = Field(0.0, ge=0, lt=1, description=mark("Fraction of the rotations dropped at random during training."))

    def trainable(self, shape: Shape) -> int:
        chosen = set(linear_names(shape, self.layers))
        inputs = [x.inputs for x in shape.each_linear() if x.name in chosen]
        widths = [nearest_divisor(n, self.block) for n in inputs]
        return sum(n // b * (b * (b - 1) // 2) for n, b in zip(inputs, widths, strict=True))

    def activation_counts(self, shape: Shape) -> Kept:
        # The rotated inputs, and four matrices for each rotated block: the generator and three steps to the rotation.
        chosen = [x for x in shape.linears() if x.name in set(linear_names(shape, self.layers))]
        return Kept(shape.layer_inputs(), 4 * sum(x.inputs * nearest_divisor(x.inputs, self.block) for x in chosen))

    @classmethod
    def drawing(cls) -> dict[str, Any]:
        return {"layers": ["frozen"] * 6, "beside": True}

    def config(self, model: torch.nn.Module, *, task: str) -> Any:
        from peft import OFTConfig

        return OFTConfig(
            task_type=self.task_type(task),
            r=0,
            oft_block_size=self.block,
            module_dropout=self.dropout,
            use_cayley_neumann=True,
            target_modules=peft_targets(shape_of(transformer(model).config.to_dict()), self.layers),
            bias="none",
        )


def nearest_divisor(width: int, block: int) -> int:
    """The divisor of `width` nearest to `block`, the smaller one of two equally near: the block size that can be used."""
    if block >= width:
        return width
    return min((d for d in range(1, width + 1) if width % d == 0), key=lambda d: (abs(d - block), d))
