"""LoRA: a low-rank correction beside each chosen linear layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from app.shapes import Shape, shape_of
from app.strategies._peft import PeftStrategy

if TYPE_CHECKING:
    import torch


class Lora(PeftStrategy):
    name: Literal["lora"] = "lora"
    title: ClassVar = "LoRA"
    family: ClassVar = "reparametrized"
    summary: ClassVar = "Learns a small correction beside each layer. Fits most tasks."
    when_to_use: ClassVar = (
        "The first thing to try: it learns nearly as much as full re-training with a hundredth of the memory for "
        "gradients, forgets little, and its result is a small file."
    )
    paper: ClassVar = ("Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models", "https://arxiv.org/abs/2106.09685")
    place: ClassVar = 10
    merges: ClassVar = True
    default_learning_rate: ClassVar = 5e-4

    rank: int = Field(
        8, ge=1, le=1024, description="Width of the correction. More learns more and costs more.", json_schema_extra={"basic": True}
    )
    alpha: float = Field(16, gt=0, le=4096, description="Strength of the correction: it is scaled by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of the correction's inputs dropped at random while training.")
    layers: Literal["all-linear", "attention", "feed-forward"] = Field("all-linear", description="Which linear layers get a correction.")

    def targets(self, shape: Shape) -> list[str]:
        """Names of the linear layers that get a correction, as they end in the model."""
        names = [linear.name for linear in shape.linears()]
        if self.layers == "all-linear":
            return names
        feed_forward = [n for n in names if n in ("gate_proj", "up_proj", "down_proj", "intermediate.dense", "output.dense")]
        return feed_forward if self.layers == "feed-forward" else [n for n in names if n not in feed_forward]

    def trainable(self, shape: Shape) -> int:
        chosen = set(self.targets(shape))
        return sum(self.rank * (x.inputs + x.outputs) for x in shape.each_linear() if x.name in chosen)

    @classmethod
    def drawing(cls) -> dict[str, Any]:
        return {"layers": ["frozen"] * 6, "beside": True}

    def config(self, model: torch.nn.Module, *, task: str) -> Any:
        from peft import LoraConfig, TaskType

        return LoraConfig(
            task_type=TaskType.CAUSAL_LM if task != "classification" else TaskType.SEQ_CLS,
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.targets(shape_of(model.config.to_dict())),
            bias="none",
        )
