"""Strategies that add small modules of our own to a frozen model, and save only those.

They are submodules of the model's own modules under the name `luthier`, and run in forward hooks that look them up there, so a
deep copy of the model has working copies of them.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from app.strategies._base import Family, Loading, Strategy
from app.strategies._files import WEIGHTS, read_weights, write_adapter

if TYPE_CHECKING:
    import torch

NAME = "luthier"
_LOADING = """trained = load_file(f"{{folder}}/{weights}")


def added(place, x):  # what the small layers of a place add: down, bend, up
    part = {{name: trained[f"{{place}}.{name}.{{name}}"].to(x) for name in ("down.weight", "down.bias", "up.weight", "up.bias")}}
    inner = F.{activation}(F.linear(x, part["down.weight"], part["down.bias"]))
    return {scale:g} * F.linear(inner, part["up.weight"], part["up.bias"])


for place in sorted({{name.split(".{name}.")[0] for name in trained}}):
    module = model.get_submodule(place)
    {hook}"""
AFTER = "module.register_forward_hook(lambda module, inputs, output, place=place: output + added(place, output))"


class Added(Strategy):
    family: ClassVar[Family] = "additive"
    tasks: ClassVar = ("generation", "classification", "preference")
    blends: ClassVar = True

    def trains_in_bf16(self) -> bool:
        return True  # the new layers' weights stay in float32; their start is exact, zero, in any dtype

    @abstractmethod
    def install(self, model: torch.nn.Module) -> None:
        """Add the modules, initially without effect, to the model and register their hooks."""

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


def loading(activation: str, scale: float = 1.0, hook: str = AFTER) -> Loading:
    """Small layers with this activation and scale, attached by the line `hook` at each of their modules."""
    lines = _LOADING.format(weights=WEIGHTS, name=NAME, activation=activation, scale=scale, hook=hook)
    return Loading(("import torch.nn.functional as F", "from safetensors.torch import load_file"), lines)
