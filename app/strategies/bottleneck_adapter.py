"""Bottleneck adapters: small dense layers after the sub-layers of every block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from app.languages import mark
from app.shapes import Shape
from app.strategies._base import Kept, Loading
from app.strategies._model import attention_output, blocks, feed_forward_output, transformer
from app.strategies._modules import AFTER, NAME, Added, loading

if TYPE_CHECKING:
    import torch

_BESIDE = """if place.endswith("mlp"):
        module.register_forward_hook(lambda module, inputs, output, place=place: output + added(place, inputs[0]))
    else:  # an encoder adds the block's input to what its feed-forward layers give
        module.register_forward_pre_hook(lambda module, inputs, place=place: (inputs[0], inputs[1] + added(place, inputs[1])))"""


class BottleneckAdapter(Added):
    name: Literal["bottleneck_adapter"] = "bottleneck_adapter"
    title: ClassVar = mark("Adapters (Houlsby/Pfeiffer)")
    summary: ClassVar = mark("Small bottleneck layers inserted into every block.")
    when_to_use: ClassVar = mark(
        "When the task asks for new computation, not only for a change of weights: more capacity than LoRA per parameter, a little slower at inference."
    )
    paper: ClassVar = ("Houlsby et al. 2019, Parameter-Efficient Transfer Learning for NLP", "https://arxiv.org/abs/1902.00751")
    place: ClassVar = 20
    suits: ClassVar = ("many rows", "far data")
    default_learning_rate: ClassVar = 5e-4
    any_architecture: ClassVar = False

    width: int = Field(
        32, ge=1, le=8192, description=mark("Bottleneck size. Higher = more capacity and memory."), json_schema_extra={"basic": True}
    )
    arrangement: Literal["houlsby", "pfeiffer", "parallel"] = Field(
        "houlsby",
        description=mark(
            "houlsby: after attention and after feed-forward. pfeiffer: after feed-forward alone (Pfeiffer et al. 2021). "
            "parallel: parallel to feed-forward (He et al. 2022)."
        ),
        json_schema_extra={"basic": True},
    )
    activation: Literal["gelu", "relu", "silu"] = Field("gelu", description=mark("Activation function between the two dense layers."))
    scale: float = Field(1.0, gt=0, le=100, description=mark("Scale of the adapter output."))

    def trainable(self, shape: Shape) -> int:
        one = 2 * shape.hidden * self.width + self.width + shape.hidden
        return shape.layers * one * (2 if self.arrangement == "houlsby" else 1)

    def activation_counts(self, shape: Shape) -> Kept:
        return Kept((shape.hidden + 2 * self.width) * (2 if self.arrangement == "houlsby" else 1))

    @classmethod
    def drawing(cls) -> dict[str, Any]:
        return {"layers": ["frozen"] * 6, "between": True}

    def install(self, model: torch.nn.Module) -> None:
        for block in blocks(model):
            if self.arrangement == "parallel":
                beside = block.get_submodule("mlp" if hasattr(block, "mlp") else "output")
                self._hang(beside, model)
                if beside is getattr(block, "mlp", None):
                    beside.register_forward_hook(_beside_mlp)
                else:
                    beside.register_forward_pre_hook(_beside_encoder_output)
                continue
            places = [feed_forward_output(block)]
            if self.arrangement == "houlsby":
                places.insert(0, attention_output(block))
            for place in places:
                self._hang(place, model)
                place.register_forward_hook(_after)

    def loading(self, *, task: str = "generation") -> Loading:
        return loading(self.activation, self.scale, _BESIDE if self.arrangement == "parallel" else AFTER)

    def _hang(self, place: torch.nn.Module, model: torch.nn.Module) -> None:
        weight = next(place.parameters())
        hidden = transformer(model).config.hidden_size
        place.add_module(NAME, make_bottleneck(hidden, self.width, self.activation, self.scale).to(weight.device))


def make_bottleneck(hidden: int, width: int, activation: str, scale: float) -> torch.nn.Module:
    """(…, hidden) → (…, hidden): down projection, activation, up projection. The last layer starts at zero, so the model starts
    unchanged."""
    import torch

    class Bottleneck(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = torch.nn.Linear(hidden, width)
            self.up = torch.nn.Linear(width, hidden)
            torch.nn.init.zeros_(self.up.weight)
            torch.nn.init.zeros_(self.up.bias)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inner = getattr(torch.nn.functional, activation)(self.down(x.to(self.down.weight.dtype)))
            outer: torch.Tensor = self.up(inner)
            return (scale * outer).to(x.dtype)

    return Bottleneck()


def _after(module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    added: torch.Tensor = getattr(module, NAME)(output)
    return output + added


def _beside_mlp(module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    added: torch.Tensor = getattr(module, NAME)(args[0])
    return output + added


def _beside_encoder_output(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    # An encoder adds its block's input to the feed-forward output and then normalizes: adding to that input is adding in parallel
    # to the feed-forward layers.
    inner, before = args
    return inner, before + getattr(module, NAME)(before)
