"""Full fine-tuning: every weight is trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from app.languages import mark
from app.objectives import OBJECTIVES
from app.shapes import Shape
from app.strategies._base import Kept, Memory, Strategy
from app.strategies._model import draw_weights, interpolate, transformer

if TYPE_CHECKING:
    import torch


BLANK_RATE = 30.0
"""Random weights are trained at so many times the learning rate of fine-tuning: 9e-4, within the 3e-4 to 1e-3 of pre-training (Biderman et
al. 2023, Pythia, table 6)."""


class Full(Strategy):
    name: Literal["full"] = "full"
    title: ClassVar = mark("Full fine-tuning")
    family: ClassVar = "full"
    summary: ClassVar = mark("Trains every weight. Most capacity, most forgetting.")
    when_to_use: ClassVar = mark(
        "When the data is far from what the model has read, there is much of it, and memory to spare: each weight "
        "needs sixteen bytes while it is trained."
    )
    tasks: ClassVar = ("generation", "classification", "preference")
    forgets: ClassVar = "much"
    place: ClassVar = 40
    adapter: ClassVar = False
    blends: ClassVar = True
    default_learning_rate: ClassVar = 3e-5
    preference_share: ClassVar = 1 / 30
    weights: Literal["pretrained", "random"] = Field(
        "pretrained",
        title=mark("Initial weights"),
        description=mark(
            "random draws every weight anew, by the run's seed: the same shape without pre-training, to see what that is worth."
        ),
        exclude_if=lambda weights: weights == "pretrained",
    )

    def trainable(self, shape: Shape) -> int:
        return shape.parameters()

    def trainable_parameters(self, shape: Shape, *, task: str = "generation", labels: int = 0) -> int:
        if not OBJECTIVES[task].heads:
            return self.trainable(shape)
        return shape.body_parameters() + self.head_parameters(shape, labels)

    def memory(self, shape: Shape, *, weight_bytes: int = 4, optimizer_bytes: int = 8) -> Memory:
        trained = self.trainable(shape)
        return Memory(weights=trained * 4, gradients=trained * 4, optimizer=trained * optimizer_bytes)

    def activation_counts(self, shape: Shape) -> Kept:
        return Kept(shape.layer_inputs())

    @classmethod
    def drawing(cls) -> dict[str, Any]:
        return {"layers": ["trained"] * 6}

    def rate_factor(self) -> float:
        return BLANK_RATE if self.weights == "random" else 1.0

    def initialize(self, model: torch.nn.Module, seed: int) -> None:
        if self.weights == "random":
            draw_weights(model, seed)

    def attach(self, model: torch.nn.Module, *, task: str = "generation", labels: int = 0) -> torch.nn.Module:
        return model.requires_grad_(True)

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        transformer(model).save_pretrained(folder, safe_serialization=True)

    def load(self, model: torch.nn.Module, folder: Path) -> torch.nn.Module:
        old = transformer(model)
        return type(old).from_pretrained(folder, dtype=old.dtype, attn_implementation=old.config._attn_implementation)

    def load_blended(self, model: torch.nn.Module, folder: Path, share: float) -> torch.nn.Module:
        tuned = self.load(model, folder).to(next(model.parameters()).device)
        return interpolate(dict(model.named_parameters()), tuned, share)
