"""NEFTune (Jain et al. 2023, https://arxiv.org/abs/2310.05914): noise on what the embedding gives, while a model trains.

Each number of a sequence of L tokens of width d gets a draw from −1 to 1 times α / √(L d). Rows in one pack are sequences of their own.
"""

from __future__ import annotations

from typing import Any

import torch

from app.strategies._model import backbone, transformer


def add_noise(model: torch.nn.Module, alpha: float) -> None:
    """Have a model that is about to train do so; `eval()` turns it off. A pass at a time: it remembers how long the rows of its pack are."""
    stack, lengths = backbone(model), [torch.ones(())]

    def look(_: Any, given: tuple, named: dict[str, Any]) -> None:
        lengths[0] = _lengths(named["position_ids"])

    def disturb(module: torch.nn.Module, _: Any, out: torch.Tensor) -> torch.Tensor | None:
        if not module.training:
            return None
        width = alpha / (lengths[0].to(torch.float32) * out.shape[-1]).sqrt()
        drawn = torch.rand(out.shape, device=out.device) * 2 - 1
        return out + (drawn * width[..., None]).to(out.dtype)

    stack.register_forward_pre_hook(look, with_kwargs=True)
    transformer(model).get_input_embeddings().register_forward_hook(disturb)


def _lengths(positions: torch.Tensor) -> torch.Tensor:
    """(1, T) places in their sequences to (1, T) lengths of these."""
    sequence = (positions == 0).cumsum(-1) - 1
    return torch.zeros_like(positions).scatter_add_(-1, sequence, torch.ones_like(positions)).gather(-1, sequence)
