"""Graph breaks in peft's layers: which of them torch.compile would compile in pieces, and a forward of LoHa and LoKr without any."""

from __future__ import annotations

import functools
from typing import Any

import torch
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.lycoris_utils import LycorisLayer

from worker.modeling.fused_lora import ADAPTER


def skip_module_dropout(model: torch.nn.Module) -> int:
    """Have layers of LoHa and LoKr without module dropout draw no random number for it: peft draws one on the host in every pass and
    branches on it, which breaks the graph 16 times per block. Returns the number of layers changed."""
    found = [
        m for m in model.modules() if isinstance(m, LycorisLayer) and not any(m.module_dropout.values()) and not hasattr(type(m), "plain")
    ]
    for layer in found:
        layer.__class__ = _without_module_dropout(type(layer))
    return len(found)


@functools.cache
def _without_module_dropout(kind: type) -> type:
    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters or self.merged:
            return kind.forward(self, x, *args, **kwargs)  # type: ignore[attr-defined]  # one of peft's layers
        result = self.base_layer(x, *args, **kwargs)
        for name in self.active_adapters:
            if name in self._available_adapters:
                result = result + self._get_delta_activations(name, x, *args, **kwargs)
        return result.to(x.dtype)

    return type(kind.__name__, (kind,), {"forward": forward, "plain": kind})


def has_graph_breaks(model: torch.nn.Module) -> bool:
    """Whether an adapter's layers break the graph in every block: LoHa and LoKr with dropout, which is drawn on the host, and peft's
    own DoRA, which DoRA with dropout takes. Compiled in pieces they would be slower than uncompiled."""
    return any(_breaks_graph(module) for module in model.modules())


def _breaks_graph(layer: Any) -> bool:
    if isinstance(layer, LycorisLayer):
        return any([*layer.rank_dropout.values(), *layer.module_dropout.values()])
    dora = any(isinstance(variant, DoraLinearVariant) for variant in getattr(layer, "lora_variant", {}).values())
    return dora and not isinstance(layer.lora_dropout[ADAPTER], torch.nn.Identity)
