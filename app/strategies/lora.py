"""LoRA: a low-rank correction of each chosen linear layer."""

from __future__ import annotations

from typing import ClassVar, Literal

from app.languages import mark
from app.strategies._advice import PLAIN_LORA
from app.strategies._own_weights import WithOwnWeights


class Lora(WithOwnWeights):
    name: Literal["lora"] = "lora"
    title: ClassVar = "LoRA"
    summary: ClassVar = mark("Trains low-rank matrices next to each linear layer. Fits most tasks.")
    when_to_use: ClassVar = mark(
        "The first thing to try: it learns nearly as much as full fine-tuning with a hundredth of the memory for "
        "gradients, forgets little, and its result is a small file."
    )
    paper: ClassVar = ("Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models", "https://arxiv.org/abs/2106.09685")
    place: ClassVar = 10
    plain_lora: ClassVar = True
    suits: ClassVar = ("close data",)
    standing: ClassVar = PLAIN_LORA
    takes_fp8: ClassVar = True
