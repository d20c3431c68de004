"""Causal language modeling: the model is trained to predict the next token of texts and answers."""

from __future__ import annotations

from typing import ClassVar

from app.languages import mark
from app.objectives._base import Objective


class CausalLM(Objective):
    name: ClassVar = "generation"
    title: ClassVar = mark("Generation")
    summary: ClassVar = mark("Generation is trained on the answers of the rows, or to continue their texts.")
    place: ClassVar = 10
    copies: ClassVar = True
    turns: ClassVar = True
    rehearses: ClassVar = True
    encoders_write: ClassVar = True
    adds_tokens: ClassVar = True
    unpacked: ClassVar = True
    fp8: ClassVar = True
    uniform: ClassVar = True
    larger_on_gpu: ClassVar = True
    graded: ClassVar = True
    few_shot: ClassVar = True
    across_models: ClassVar = ("bits_per_byte",)
