"""Which of peft's layers a compiler can take whole, and what makes more of them so."""

from __future__ import annotations

import functools
from typing import Any

import torch
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.lycoris_utils import LycorisLayer

from worker.modeling.fused_lora import ADAPTER


def never_drop_layers(model: torch.nn.Module) -> int:
    """Have LoHa's and LoKr's layers, which may leave themselves out at random, not draw a number for it where none ever does: the host
    looks at what was drawn, so a compiler stops there, 16 times a block. Returns how many there were."""
    found = [m for m in model.modules() if isinstance(m, LycorisLayer) and not any(m.module_dropout.values())]
    for layer in found:
        layer.__class__ = _never_dropped(type(layer))  # type: ignore[arg-type]  # a class is hashable
    return len(found)


@functools.cache
def _never_dropped(kind: type) -> type:
    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters or self.merged:
            return kind.forward(self, x, *args, **kwargs)  # type: ignore[attr-defined,no-any-return]  # one of peft's layers
        result = self.base_layer(x, *args, **kwargs)
        for name in self.active_adapters:
            if name in self._available_adapters:
                result = result + self._get_delta_activations(name, x, *args, **kwargs)
        return result.to(x.dtype)  # type: ignore[no-any-return]

    return type(kind.__name__, (kind,), {"forward": forward})


def breaks_graphs(model: torch.nn.Module) -> bool:
    """Whether a strategy's layers hold what a compiler stops at in every block: the dropout of LoHa and LoKr, which is drawn on the host,
    and peft's own DoRA, which is what DoRA with dropout takes. Compiled in pieces they would be slower than as they are."""
    return any(
        any([*m.rank_dropout.values(), *m.module_dropout.values()])
        if isinstance(m, LycorisLayer)
        else any(isinstance(variant, DoraLinearVariant) for variant in getattr(m, "lora_variant", {}).values())
        and not isinstance(m.lora_dropout[ADAPTER], torch.nn.Identity)
        for m in model.modules()
    )
