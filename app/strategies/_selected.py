"""Strategies that train some of the model's own parameters and freeze the rest. Only those are saved."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from app.shapes import Shape
from app.strategies._base import Loading, Memory, Strategy
from app.strategies._files import WEIGHTS, read_weights, write_adapter
from app.strategies._model import interpolate, parent_of, transformer

if TYPE_CHECKING:
    import torch


class Selected(Strategy):
    tasks: ClassVar = ("generation", "classification", "preference")
    merges: ClassVar = True  # it already is a plain model
    blends: ClassVar = True

    @abstractmethod
    def chosen(self, model: torch.nn.Module) -> list[str]:
        """Names of the trained parameters."""

    def trains_in_bf16(self) -> bool:
        return True  # trained weights stay in float32, as in full fine-tuning

    def memory(self, shape: Shape, *, weight_bytes: int = 4, optimizer_bytes: int = 8) -> Memory:
        # The trained weights are the model's own: they are stored once, at 4 bytes.
        trained = self.trainable(shape)
        frozen = shape.parameters() - trained
        return Memory(weights=frozen * weight_bytes + trained * 4, gradients=trained * 4, optimizer=trained * optimizer_bytes)

    def attach(self, model: torch.nn.Module, *, task: str = "generation", labels: int = 0) -> torch.nn.Module:
        names = set(self.chosen(model))
        for name, parameter in model.named_parameters():
            if name in names:
                parameter.data = parameter.data.float()  # in bf16 an update would be below the last bit, and lost
            parameter.requires_grad_(name in names)
        match_norms(model)
        return model

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        named = dict(model.named_parameters())
        write_adapter(folder, self.describe(model), {name: named[name] for name in self.chosen(model)})

    def load(self, model: torch.nn.Module, folder: Path) -> torch.nn.Module:
        import torch

        for name, value in read_weights(folder).items():
            module, last = parent_of(model, name)
            # A new parameter, not a copy into the old one, which siblings of this model may share.
            setattr(module, last, torch.nn.Parameter(value.to(getattr(module, last)), requires_grad=False))
        if getattr(model.config, "tie_word_embeddings", False):
            transformer(model).tie_weights()
        return model

    def load_blended(self, model: torch.nn.Module, folder: Path, share: float) -> torch.nn.Module:
        base = dict(model.named_parameters())
        return interpolate(base, self.load(model, folder), share)

    def loading(self, *, task: str = "generation") -> Loading:
        lines = f'model.load_state_dict(load_file(f"{{folder}}/{WEIGHTS}"), strict=False)  # the trained weights replace the base\'s'
        return Loading(("from safetensors.torch import load_file",), lines)

    def merge(self, model: torch.nn.Module) -> torch.nn.Module:
        return model


def match_norms(model: torch.nn.Module) -> None:
    """A norm needs a weight and a bias of one dtype: where one of them is trained in float32, convert the other too."""
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if len({p.dtype for p in own}) > 1 and all(p.dim() == 1 for p in own):
            for parameter in own:
                parameter.data = parameter.data.float()
