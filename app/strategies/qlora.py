"""QLoRA: LoRA on a base whose weights are stored in 4 bits."""

from __future__ import annotations

from typing import ClassVar, Literal

from app.languages import gettext, mark
from app.shapes import Shape
from app.strategies._base import Memory
from app.strategies._chosen import ChosenLowRank


class QLora(ChosenLowRank):
    name: Literal["qlora"] = "qlora"
    title: ClassVar = "QLoRA"
    summary: ClassVar = mark("LoRA on a 4-bit base: a quarter of the memory for weights.")
    when_to_use: ClassVar = mark("When the model does not fit the GPU otherwise. Slower than LoRA, and nearly as good.")
    paper: ClassVar = ("Dettmers et al. 2023, QLoRA: Efficient Finetuning of Quantized LLMs", "https://arxiv.org/abs/2305.14314")
    place: ClassVar = 19
    plain_lora: ClassVar = True
    base_bits: ClassVar = 4

    def memory(self, shape: Shape, *, weight_bytes: int = 4, optimizer_bytes: int = 8) -> Memory:
        """4-bit NormalFloat takes half a byte per weight, and its double-quantized block constants 0.127 bits more (the paper,
        section 3); embeddings, norms and head stay at `weight_bytes`."""
        trained = self.trainable(shape)
        squeezed = sum(x.inputs * x.outputs for x in shape.each_linear())
        weights = squeezed * 4.127 / 8 + (shape.parameters() - squeezed) * weight_bytes + trained * 4
        return Memory(weights=int(weights), gradients=trained * 4, optimizer=trained * optimizer_bytes)

    def unavailable(self, shape: Shape, *, task: str = "generation", cuda: bool = False) -> str | None:
        if not cuda:
            return gettext("A 4-bit base needs an NVIDIA GPU. Choose LoRA, which needs no GPU.")
        return super().unavailable(shape, task=task, cuda=cuda)
