"""Top layers: the last blocks are trained, the rest is frozen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from pydantic import Field

from app.languages import gettext, mark
from app.objectives import OBJECTIVES
from app.shapes import Shape
from app.strategies._base import Kept
from app.strategies._model import blocks, final_norm, transformer
from app.strategies._selected import Selected

if TYPE_CHECKING:
    import torch


class TopLayers(Selected):
    name: Literal["top_layers"] = "top_layers"
    title: ClassVar = mark("Last layers only")
    family: ClassVar = "partial"
    summary: ClassVar = mark("Trains the last blocks; the rest is frozen.")
    when_to_use: ClassVar = mark(
        "When the model already understands the text and must be taught what to do with it. No gradient flows through the "
        "frozen blocks below, so it is quick and light."
    )
    forgets: ClassVar = "some"
    paper: ClassVar = (
        "Howard and Ruder 2018, Universal Language Model Fine-tuning for Text Classification",
        "https://arxiv.org/abs/1801.06146",
    )
    place: ClassVar = 30
    suits: ClassVar = ("far data",)
    default_learning_rate: ClassVar = 3e-4
    preference_share: ClassVar = 1 / 30

    layers: int = Field(
        2, ge=1, le=1000, description=mark("Number of trainable blocks, counted from the last."), json_schema_extra={"basic": True}
    )
    norm: bool = Field(True, description=mark("Train the final norm too."))
    output_layer: bool = Field(
        False,
        description=mark(
            "Train the output layer too. Where it shares its weights with the input embedding, both change, and gradients pass every block: as slow as full fine-tuning."
        ),
    )

    def trainable(self, shape: Shape) -> int:
        decoder = shape.architecture == "decoder"
        norm = shape.final_norm_parameters() if self.norm else 0
        return shape.top_parameters(self.layers) + norm + (shape.vocabulary * shape.hidden if self.output_layer and decoder else 0)

    def activation_counts(self, shape: Shape) -> Kept:
        return Kept(shape.layer_inputs())

    def reaches(self, shape: Shape) -> int:
        if self.output_layer and shape.tied:
            return shape.layers  # the output layer is tied to the input embedding, so gradients reach all layers
        return min(self.layers, shape.layers)

    def unavailable(self, shape: Shape, *, task: str = "generation", cuda: bool = False) -> str | None:
        if self.layers > shape.layers:
            return gettext(
                "The model has %(blocks)s blocks, fewer than %(chosen)s. Choose %(blocks)s or less.",
                blocks=shape.layers,
                chosen=self.layers,
            )
        if self.output_layer and OBJECTIVES[task].heads:
            return gettext("A classifier has an output layer of its own, which is always trained. Turn the setting `output_layer` off.")
        return super().unavailable(shape, task=task, cuda=cuda)

    @classmethod
    def drawing(cls) -> dict[str, Any]:
        return {"layers": ["trained"] * 2 + ["frozen"] * 4}

    def chosen(self, model: torch.nn.Module) -> list[str]:
        learning: list[torch.Tensor] = [p for block in list(blocks(model))[-self.layers :] for p in block.parameters()]
        norm = final_norm(model)
        if self.norm and norm is not None:
            learning += norm.parameters()
        if self.output_layer:
            learning.append(cast("torch.nn.Linear", transformer(model).get_output_embeddings()).weight)
        wanted = {id(parameter) for parameter in learning}
        return [name for name, parameter in model.named_parameters() if id(parameter) in wanted]
