"""Strategies that add small modules of our own to a frozen model, and save those alone.

The modules hang on the model's own modules under the name `luthier`, and run in forward hooks that find them there, so
a copy of the model carries working copies of them.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from app.strategies._base import Strategy
from app.strategies._files import read_weights, write_adapter

if TYPE_CHECKING:
    import torch

NAME = "luthier"


class Added(Strategy):
    family: ClassVar = "additive"
    tasks: ClassVar = ("generation", "classification", "preference")
    blends: ClassVar = True

    @abstractmethod
    def install(self, model: torch.nn.Module) -> None:
        """Hang the modules, as yet without effect, on the model and register their hooks."""

    def attach(self, model: torch.nn.Module, *, task: str = "generation", labels: int = 0) -> torch.nn.Module:
        model.requires_grad_(False)
        self.install(model)
        return model

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        ours = {name: value for name, value in model.state_dict().items() if f".{NAME}." in name}
        write_adapter(folder, self.describe(model), ours)

    def load(self, model: torch.nn.Module, folder: Path) -> torch.nn.Module:
        self.install(model)
        named = dict(model.named_parameters())
        for name, value in read_weights(folder).items():
            named[name].data = value.to(named[name])
            named[name].requires_grad_(False)
        return model

    def load_blended(self, model: torch.nn.Module, folder: Path, share: float) -> torch.nn.Module:
        loaded = self.load(model, folder)
        for name, weight in loaded.named_parameters():
            if f".{NAME}.up." in name:  # the last layer of what is added, so the sum is scaled
                weight.data = share * weight.data
        return loaded
