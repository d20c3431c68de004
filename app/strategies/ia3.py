"""(IA)³: trained factors on keys, values and the activations inside the feed-forward layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from app.languages import mark
from app.shapes import Shape, shape_of
from app.strategies._base import Kept
from app.strategies._model import transformer
from app.strategies._peft import PeftStrategy

if TYPE_CHECKING:
    import torch


class Ia3(PeftStrategy):
    name: Literal["ia3"] = "ia3"
    title: ClassVar = "(IA)³"
    family: ClassVar = "additive"
    tasks: ClassVar = ("generation", "classification", "preference")
    summary: ClassVar = mark("Rescales activations: a few thousand trainable parameters per layer.")
    when_to_use: ClassVar = mark("With tens of examples: so few trainable parameters that it hardly overfits.")
    paper: ClassVar = (
        "Liu et al. 2022, Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
        "https://arxiv.org/abs/2205.05638",
    )
    place: ClassVar = 50
    suits: ClassVar = ("few rows", "close data", "solved")
    unsuited: ClassVar = ("many rows", "far data")
    arithmetic: ClassVar = 2
    merges: ClassVar = True
    blends: ClassVar = True
    scaled: ClassVar = (".ia3_l.",)
    neutral: ClassVar = 1.0
    default_learning_rate: ClassVar = 1.5e-2
    any_architecture: ClassVar = False

    def trainable(self, shape: Shape) -> int:
        key_value, down = self._targets(shape)
        return sum(x.inputs if x.name == down else x.outputs for x in shape.each_linear() if x.name in (*key_value, down))

    def activation_counts(self, shape: Shape) -> Kept:
        return Kept(2 * shape.kv_heads * shape.head_dim + shape.intermediate)

    def trains_in_bf16(self) -> bool:
        return True  # its factors stay in float32, and it adds nothing that rounding could lose

    def _targets(self, shape: Shape) -> tuple[tuple[str, str], str]:
        return (("key", "value"), "output.dense") if shape.architecture == "encoder" else (("k_proj", "v_proj"), "down_proj")

    @classmethod
    def drawing(cls) -> dict[str, Any]:
        return {"layers": ["frozen"] * 6, "inside": True}

    def config(self, model: torch.nn.Module, *, task: str) -> Any:
        from peft import IA3Config

        shape = shape_of(transformer(model).config.to_dict())
        key_value, down = self._targets(shape)
        # An encoder's attention ends in a layer with the same suffix; a pattern over the whole name excludes it.
        pattern = rf".*layer\.\d+\.(attention\.self\.(key|value)|{down})" if shape.architecture == "encoder" else None
        feed_forward = rf".*layer\.\d+\.{down}" if pattern else [down]
        return IA3Config(task_type=self.task_type(task), target_modules=pattern or [*key_value, down], feedforward_modules=feed_forward)
