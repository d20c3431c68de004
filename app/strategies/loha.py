"""LoHa: the correction is the element-wise product of two low-rank products, so a small rank reaches a large one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from app.languages import mark
from app.shapes import Shape, shape_of
from app.strategies._base import Kept
from app.strategies._low_rank import LowRank, peft_targets
from app.strategies._model import transformer

if TYPE_CHECKING:
    import torch


class LoHa(LowRank):
    name: Literal["loha"] = "loha"
    title: ClassVar = "LoHa"
    summary: ClassVar = mark("Hadamard product of two low-rank matrices: more expressive at the same rank.")
    when_to_use: ClassVar = mark(
        "When LoRA at a small rank underfits and the file must stay small. Slower: the full update is built at every step."
    )
    paper: ClassVar = (
        "Hyeon-Woo et al. 2021, FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning",
        "https://arxiv.org/abs/2108.06098",
    )
    place: ClassVar = 15
    default_learning_rate: ClassVar = 1e-3
    scaled: ClassVar = (".hada_w1_a.",)

    def trainable(self, shape: Shape) -> int:
        return 2 * super().trainable(shape)

    def activation_counts(self, shape: Shape) -> Kept:
        # The correction is materialized, as large as the weights, and kept until the gradient has passed.
        return Kept(shape.layer_inputs(), sum(x.inputs * x.outputs for x in shape.linears() if x.name in set(self.targets(shape))))

    def config(self, model: torch.nn.Module, *, task: str) -> Any:
        from peft import LoHaConfig

        return LoHaConfig(
            task_type=self.task_type(task),
            r=self.rank,
            alpha=self.alpha,  # type: ignore[arg-type]  # peft divides by the rank, and takes any number
            rank_dropout=self.dropout,
            target_modules=peft_targets(shape_of(transformer(model).config.to_dict()), self.layers),
        )
