"""Layers of a model that read the same input (q, k and v; gate and up) and can share one matrix product."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch

from app.strategies._low_rank import JOINED
from app.strategies._model import place_for_notes


def siblings(model: torch.nn.Module, kind: type) -> Iterator[list[Any]]:
    """Each such set of sibling layers of class `kind`, all with or all without a bias, and of one dtype."""
    for parent in model.modules():
        for names in JOINED:
            layers: list[Any] = [getattr(parent, name, None) for name in names]
            if all(isinstance(layer, kind) for layer in layers):
                linears = [getattr(layer, "base_layer", layer) for layer in layers]
                if len({(linear.bias is None, linear.weight.dtype) for linear in linears}) == 1:
                    yield layers


class SharedProjection(ABC):
    """Layers computed together by whichever is called first. Each layer refers to it as `group`, and has its `place` in it."""

    def __init__(self, layers: Sequence[Any], device: torch.device) -> None:
        self.layers = layers
        self.widths = [layer.out_features for layer in layers]
        self.kept = cast("Any", place_for_notes(device))  # .source and .parts: the last input, and the outputs not taken yet
        # Both exist from the start: torch.compile guards on a missing attribute, and would compile again once the first uncompiled pass,
        # an evaluation, has set it.
        self.kept.source, self.kept.parts = None, [None] * len(self.layers)
        for place, layer in enumerate(layers):
            layer.group, layer.place = self, place

    @abstractmethod
    def product(self, x: torch.Tensor) -> torch.Tensor:
        """The outputs of all layers for x (…, K), concatenated: (…, ΣN)."""

    def take(self, place: int, x: torch.Tensor) -> torch.Tensor:
        """The output of the layer at `place`. Each is handed out once, and only for the very tensor it was computed from."""
        kept = self.kept
        if getattr(kept, "source", None) is not x or kept.parts[place] is None:
            kept.source, kept.parts = x, list(self.product(x).split_with_sizes(self.widths, -1))
        result, kept.parts[place] = kept.parts[place], None
        if all(part is None for part in kept.parts):
            kept.source = None
        return result


class SharedProjectionPart:
    """Mixin of a peft layer that may be in a group."""

    group: Any = None
    place = 0  # in the group

    def shares(self: Any, x: torch.Tensor) -> bool:
        """Whether x is multiplied by the whole group in one product."""
        return self.group is not None and not (self.disable_adapters or self.merged)
