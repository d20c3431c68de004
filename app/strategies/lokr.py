"""LoKr: the correction is a Kronecker product of a small matrix and another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from app.languages import mark
from app.shapes import Shape, shape_of
from app.strategies._base import Kept
from app.strategies._low_rank import LowRank, peft_targets
from app.strategies._model import transformer

if TYPE_CHECKING:
    import torch


class LoKr(LowRank):
    name: Literal["lokr"] = "lokr"
    title: ClassVar = "LoKr"
    summary: ClassVar = mark("Kronecker product of two matrices: the smallest file with full rank.")
    when_to_use: ClassVar = mark("When the result must be tiny yet full-rank. Slower than LoRA at every step.")
    paper: ClassVar = (
        "Yeh et al. 2023, Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation",
        "https://arxiv.org/abs/2309.14859",
    )
    place: ClassVar = 16
    default_learning_rate: ClassVar = 1e-3
    scaled: ClassVar = (".lokr_w1.", ".lokr_w1_a.")

    factor: int = Field(-1, ge=-1, le=1024, description=mark("Size of the smaller matrix. -1 makes both about equal."))

    def trainable(self, shape: Shape) -> int:
        chosen = set(self.targets(shape))
        return sum(self._one(x.inputs, x.outputs) for x in shape.each_linear() if x.name in chosen)

    def _one(self, inputs: int, outputs: int) -> int:
        in_small, in_large = split(inputs, self.factor)
        out_small, out_large = split(outputs, self.factor)
        low_rank = self.rank < max(out_large, in_large) / 2
        return out_small * in_small + (self.rank * (out_large + in_large) if low_rank else out_large * in_large)

    def activation_counts(self, shape: Shape) -> Kept:
        # The correction is materialized, as large as the weights, and kept until the gradient has passed.
        return Kept(shape.layer_inputs(), sum(x.inputs * x.outputs for x in shape.linears() if x.name in set(self.targets(shape))))

    def config(self, model: torch.nn.Module, *, task: str) -> Any:
        from peft import LoKrConfig

        return LoKrConfig(
            task_type=self.task_type(task),
            r=self.rank,
            alpha=self.alpha,  # type: ignore[arg-type]  # peft divides by the rank, and takes any number
            rank_dropout=self.dropout,
            decompose_factor=self.factor,
            target_modules=peft_targets(shape_of(transformer(model).config.to_dict()), self.layers),
        )


def split(dimension: int, factor: int) -> tuple[int, int]:
    """Two divisors of a width, the smaller first: `factor` and the quotient where it divides, else the pair nearest to the square
    root whose smaller member is at most `factor`."""
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor  # as peft does, whichever is larger
    limit = dimension if factor == -1 else factor
    small = max(d for d in range(1, int(dimension**0.5) + 1) if dimension % d == 0 and d <= limit)
    return small, dimension // small
