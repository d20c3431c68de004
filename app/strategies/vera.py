"""VeRA: one pair of random matrices for all layers, frozen; each layer trains two vectors that scale them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from app.languages import mark
from app.shapes import Shape, shape_of
from app.strategies._base import Family, Kept, Memory
from app.strategies._low_rank import JOINED, InOnePass, LayerChoice, linear_names, peft_targets
from app.strategies._model import transformer
from app.strategies._peft import PeftStrategy

if TYPE_CHECKING:
    import torch


class Vera(InOnePass, PeftStrategy):
    name: Literal["vera"] = "vera"
    title: ClassVar = "VeRA"
    family: ClassVar[Family] = "reparametrized"
    tasks: ClassVar = ("generation", "classification", "preference")
    summary: ClassVar = mark("Frozen random matrices shared by all layers; each layer trains only scaling vectors.")
    when_to_use: ClassVar = mark(
        "When the result must be small: some ten times fewer trainable parameters than LoRA. The file also holds the random "
        "matrices, so of a small model it may be larger than a LoRA's."
    )
    paper: ClassVar = ("Kopiczko et al. 2023, VeRA: Vector-based Random Matrix Adaptation", "https://arxiv.org/abs/2310.11454")
    place: ClassVar = 17
    arithmetic: ClassVar = 2
    merges: ClassVar = True
    blends: ClassVar = True
    scaled: ClassVar = (".vera_lambda_b.",)
    default_learning_rate: ClassVar = 5e-3

    rank: int = Field(128, ge=1, le=4096, description=mark("Rank of the shared random matrices."), json_schema_extra={"basic": True})
    layers: LayerChoice = Field("all-linear", description=mark("Which linear layers are scaled."))
    dropout: float = Field(0.0, ge=0, lt=1, description=mark("Fraction of the inputs dropped at random during training."))

    def trainable(self, shape: Shape) -> int:
        chosen = set(linear_names(shape, self.layers))
        return sum(self.rank + x.outputs for x in shape.each_linear() if x.name in chosen)

    def memory(self, shape: Shape, *, weight_bytes: int = 4, optimizer_bytes: int = 8) -> Memory:
        plain = super().memory(shape, weight_bytes=weight_bytes, optimizer_bytes=optimizer_bytes)
        chosen = [x for x in shape.linears() if x.name in set(linear_names(shape, self.layers))]
        shared = self.rank * (max(x.inputs for x in chosen) + max(x.outputs for x in chosen))
        return plain._replace(weights=plain.weights + shared * 4)

    def activation_counts(self, shape: Shape) -> Kept:
        # The projections are frozen, so their inputs are not needed; their outputs are, and with peft's own layers their results.
        names = linear_names(shape, self.layers)
        if not self.joins():
            return Kept(shape.layer_outputs() + self.rank * len(names))
        shared = [len(joint) - 1 for joint in JOINED if set(joint) <= set(names)]  # computed once for layers that read the same input
        return Kept(self.rank * (len(names) - sum(shared)))

    @classmethod
    def drawing(cls) -> dict[str, Any]:
        return {"layers": ["frozen"] * 6, "inside": True, "beside": True}

    def config(self, model: torch.nn.Module, *, task: str) -> Any:
        from peft import VeraConfig

        return VeraConfig(
            task_type=self.task_type(task),
            r=self.rank,
            vera_dropout=self.dropout,
            target_modules=peft_targets(shape_of(transformer(model).config.to_dict()), self.layers),
            save_projection=True,  # the file then loads on any machine, whatever its random numbers
        )
