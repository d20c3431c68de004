"""The optimizer, the learning rate over time, and clipping; the state in plain tensors so that it can be saved without pickle."""

from __future__ import annotations

import math
from typing import Literal

import torch

from app.errors import DoesNotFit

Named = dict[str, torch.nn.Parameter]


def trained_parameters(model: torch.nn.Module) -> Named:
    """What learns, by name. Raises DoesNotFit when nothing does."""
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise DoesNotFit("The strategy leaves nothing to learn in this model.", way_out="Choose another strategy or other layers.")
    return found


HEAD = "classifier_head."
HEAD_RATE = 10.0
"""A new head on a tuned model starts from noise, so it learns faster than what was trained before (discriminative learning
rates, Howard and Ruder 2018, ULMFiT, section 3.2)."""


def make_optimizer(parameters: Named, learning_rate: float, weight_decay: float, kind: str = "adamw") -> torch.optim.Optimizer:
    """AdamW in one fused kernel. Only matrices decay: pulling biases and norms to zero helps nothing."""
    mixed = len({name.startswith(HEAD) for name in parameters}) == 2
    groups = []
    for head in (False, True):
        own = [p for name, p in parameters.items() if name.startswith(HEAD) == head]
        scale = HEAD_RATE if head and mixed else 1.0
        groups.append({"params": [p for p in own if p.ndim >= 2], "weight_decay": weight_decay, "scale": scale})
        groups.append({"params": [p for p in own if p.ndim < 2], "weight_decay": 0.0, "scale": scale})
    groups = [g for g in groups if g["params"]]
    if kind == "adamw_8bit":
        return _adamw_8bit(groups, learning_rate)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.999), fused=True)


def _adamw_8bit(groups: list[dict], learning_rate: float) -> torch.optim.Optimizer:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise DoesNotFit(
            "The 8-bit optimizer needs a GPU and the package bitsandbytes.", way_out="Choose adamw.", param="optimizer"
        ) from None
    return AdamW8bit(groups, lr=learning_rate, betas=(0.9, 0.999))


def rate(step: int, total: int, peak: float, schedule: Literal["cosine", "linear", "constant"], warmup_fraction: float) -> float:
    """The learning rate of optimizer step `step` (1 to `total`): a linear rise, then the schedule, never quite zero."""
    warmup = math.ceil(warmup_fraction * total) if warmup_fraction else 0
    if step <= warmup:
        return peak * step / warmup
    if schedule == "constant":
        return peak
    done = (step - warmup - 1) / max(1, total - warmup)
    return peak * (1 - done) if schedule == "linear" else peak * 0.5 * (1 + math.cos(math.pi * done))


def set_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value * group["scale"]


def clip(parameters: Named, longest: float, norm: torch.Tensor | None = None) -> torch.Tensor:
    """The length of the whole gradient, before it is shortened to `longest` (0: left as it is). Makes no device wait.
    `norm` is that length where these are not all of its parts.

    A gradient that is not finite is left alone; `skip_if_not_finite` keeps it from the weights.
    """
    gradients = [p.grad for p in parameters.values() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients) if norm is None else norm
    if longest > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters.values(), longest, norm)
    return norm


def skip_if_not_finite(optimizer: torch.optim.Optimizer, norm: torch.Tensor) -> None:
    """Let the fused kernel leave weights and moments untouched when the gradient is not finite, decided on the device."""
    optimizer.grad_scale = None
    optimizer.found_inf = (~torch.isfinite(norm)).to(torch.float32)


def state_tensors(optimizer: torch.optim.Optimizer, parameters: Named) -> dict[str, torch.Tensor]:
    """The optimizer's state as `{"<moment>/<parameter>": tensor}`."""
    found = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                found[f"{key}/{name}"] = value.detach().cpu().contiguous()
    return found


def load_state(optimizer: torch.optim.Optimizer, parameters: Named, tensors: dict[str, torch.Tensor]) -> None:
    """Put back what `state_tensors` gave, each tensor in its own type."""
    for name, parameter in parameters.items():
        own = {key.partition("/")[0]: value for key, value in tensors.items() if key.partition("/")[2] == name}
        if own:
            optimizer.state[parameter] = {
                k: v.clone() if k == "step" and not parameter.is_cuda else v.to(parameter.device) for k, v in own.items()
            }
