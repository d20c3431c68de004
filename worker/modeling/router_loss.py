"""The load-balancing loss of a mixture of experts, where its routers train: without it a router sends ever more tokens to few experts.

(Fedus et al. 2021, Switch Transformers, https://arxiv.org/abs/2101.03961, equations 4 to 6.) The function and its weight are the model's
own, as transformers adds it to a loss with `output_router_logits`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from app.strategies._model import decoder


class RouterLoss(NamedTuple):
    """The loss of a model: `function(router logits by layer, experts, experts per token, mask (1, T))` gives a scalar."""

    function: Callable[..., torch.Tensor]
    coefficient: float
    experts: int
    per_token: int

    def of(self, logits: tuple[torch.Tensor, ...], real: torch.Tensor) -> torch.Tensor:
        """The weighted loss of a pack, a scalar. `real` (1, T) is 1 at tokens and 0 at padding."""
        return self.coefficient * self.function(logits, self.experts, self.per_token, real)


def router_loss_of(model: torch.nn.Module) -> RouterLoss | None:
    """The loss of a transformers model with its strategy attached; None where it has none or no router of it trains."""
    coefficient = getattr(model, "router_aux_loss_coef", None)
    function = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    if not coefficient or function is None or not any(p.requires_grad for router in _routers(model) for p in router.parameters()):
        return None
    inner: Any = model
    return RouterLoss(function, float(coefficient), inner.num_experts, inner.num_experts_per_tok)


def _routers(model: Any) -> Iterator[torch.nn.Module]:
    """The modules whose outputs transformers records as router logits."""
    named = (getattr(decoder(model), "_can_record_outputs", None) or {}).get("router_logits", [])
    kinds = [getattr(one, "target_class", one) for one in (named if isinstance(named, list) else [named])]
    for module in model.modules():
        if any(isinstance(kind, type) and isinstance(module, kind) for kind in kinds):
            yield module
