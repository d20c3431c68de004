"""Layers of a model that read the same input (q, k and v; gate and up) and so can share one product."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from app.strategies._low_rank import JOINED
from app.strategies._model import place_for_notes


def siblings(model: torch.nn.Module, kind: type) -> Iterator[list[Any]]:
    """The layers of each such set, where all of them are of `kind`, with or all without a bias, and of one type of numbers."""
    for parent in model.modules():
        for names in JOINED:
            layers: list[Any] = [getattr(parent, name, None) for name in names]
            if all(isinstance(layer, kind) for layer in layers):
                linears = [getattr(layer, "base_layer", layer) for layer in layers]
                if len({(linear.bias is None, linear.weight.dtype) for linear in linears}) == 1:
                    yield layers


class SharedProjection(ABC):
    """Layers computed together by whichever is called first. Each knows it as `group`, and its own `place` in it."""

    def __init__(self, layers: Sequence[Any], device: torch.device) -> None:
        self.layers = layers
        self.widths = [layer.out_features for layer in layers]
        self.kept: Any = place_for_notes(device)  # .source and .parts: an input, and what of its outputs nobody took yet
        # Both are there from the start: a compiler makes a graph that holds only while an attribute is missing, and another one once the
        # first pass that is not compiled, an evaluation, has set it.
        self.kept.source, self.kept.parts = None, [None] * len(self.layers)
        for place, layer in enumerate(layers):
            layer.group, layer.place = self, place

    @abstractmethod
    def product(self, x: torch.Tensor) -> torch.Tensor:
        """The outputs of all layers for x (…, K) side by side, (…, ΣN)."""

    def take(self, place: int, x: torch.Tensor) -> torch.Tensor:
        """The output of the layer at `place`. Each is handed out once, and only for the very input it was made of."""
        kept = self.kept
        if getattr(kept, "source", None) is not x or kept.parts[place] is None:
            kept.source, kept.parts = x, list(self.product(x).split_with_sizes(self.widths, -1))
        result, kept.parts[place] = kept.parts[place], None
        if all(part is None for part in kept.parts):
            kept.source = None
        return result


class SharedProjectionPart:
    """What a layer of peft's that may be in a group has for it."""

    group: Any = None
    place = 0  # in the group

    def shares(self: Any, x: torch.Tensor) -> bool:
        """Whether x is multiplied by the layers of a group together."""
        return self.group is not None and not (self.disable_adapters or self.merged)
