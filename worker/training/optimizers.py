"""Makes the optimizers of `app/optimizers.py`. Each is given groups of parameters, the learning rate, betas and eps, and keeps what it
remembers in `state` by parameter, so that `worker/training/optim.py` can save it and put it back to the bit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from app.errors import DoesNotFit

Groups = list[dict[str, Any]]


def adamw(groups: Groups, lr: float, betas: Any, eps: Any) -> torch.optim.Optimizer:
    """One fused kernel."""
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def adamw_8bit(groups: Groups, lr: float, betas: Any, eps: Any, paged: bool = False) -> torch.optim.Optimizer:
    """Moments in 8 bits, each 256 of them with a scale of their own (Dettmers et al. 2022, 8-bit Optimizers via Block-wise
    Quantization). Tensors of under 4,096 numbers keep theirs in float32. Paged, they may leave the card for the machine's memory."""
    if find_spec("bitsandbytes") is None:
        raise DoesNotFit("The 8-bit optimizer needs a GPU and the package bitsandbytes.", hint="Choose adamw.", param="optimizer")
    from bitsandbytes import optim

    return (optim.PagedAdamW8bit if paged else optim.AdamW8bit)(groups, lr=lr, betas=betas, eps=eps)


def paged_adamw_8bit(groups: Groups, lr: float, betas: Any, eps: Any) -> torch.optim.Optimizer:
    return adamw_8bit(groups, lr, betas, eps, paged=True)


class Lion(torch.optim.Optimizer):
    """Every number by the sign of a mean of its gradients (Chen et al. 2023, Symbolic Discovery of Optimization Algorithms):

    w ← w (1 − η λ) − η sign(β₁ m + (1 − β₁) g),  m ← β₂ m + (1 − β₂) g
    """

    def __init__(self, groups: Groups, lr: float, betas: Any, eps: Any = None) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nobody gives a closure
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                mean = state["exp_avg"]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(mean.lerp(p.grad, 1 - b1).sign_(), alpha=-group["lr"])
                mean.lerp_(p.grad, 1 - b2)


class Muon:
    """Matrices by torch's Muon, their steps as long as AdamW's (Liu et al. 2025, Muon is Scalable for LLM Training), and all else by AdamW.
    Groups with `muon` are the matrices'. Both share one state, so that the two are one optimizer to whoever saves it."""

    def __init__(self, groups: Groups, lr: float, betas: Any, eps: Any) -> None:
        matrices = [g for g in groups if g["muon"]]
        others = [g for g in groups if not g["muon"]]
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(torch.optim.Muon(matrices, lr=lr, adjust_lr_fn="match_rms_adamw"))
        if others:
            self.parts.append(torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps))
        self.state: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
        for part in self.parts:
            part.state = self.state
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        self.defaults: dict[str, Any] = {}

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)


def adafactor(groups: Groups, lr: float, betas: Any, eps: Any) -> torch.optim.Optimizer:
    """The mean square of a matrix's gradients as a row times a column (Shazeer and Stern 2018), at the learning rate that is given."""
    from transformers.optimization import Adafactor

    return Adafactor(groups, lr=lr, scale_parameter=False, relative_step=False)


MAKERS: dict[str, Callable[..., Any]] = {
    "adamw": adamw,
    "adamw_8bit": adamw_8bit,
    "paged_adamw_8bit": paged_adamw_8bit,
    "lion": Lion,
    "muon": Muon,
    "adafactor": adafactor,
}
