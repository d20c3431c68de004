"""The optimizers: their memory, requirements and settings. `worker/training/optimizers.py` creates them."""

from __future__ import annotations

from typing import Literal, NamedTuple

Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "lion", "muon", "adafactor"]


class OptimizerKind(NamedTuple):
    """`bytes` is its state per trained parameter, and `rate` its suitable learning rate relative to AdamW's."""

    bytes: int
    betas: tuple[float, float] | None = (0.9, 0.999)
    eps: float | None = 1e-8
    needs_gpu: bool = False
    spreads: bool = True  # a process that holds some rows of a weight can update them alone
    rate: float = 1.0


OPTIMIZERS: dict[str, OptimizerKind] = {
    "adamw": OptimizerKind(bytes=8),
    "adamw_8bit": OptimizerKind(bytes=2, needs_gpu=True),
    "paged_adamw_8bit": OptimizerKind(bytes=2, needs_gpu=True, spreads=False),
    # A sign update changes every weight by the whole rate: 3 to 10 times less than AdamW's (Chen et al. 2023, Lion,
    # https://arxiv.org/abs/2302.06675, section 5).
    "lion": OptimizerKind(bytes=4, betas=(0.9, 0.99), eps=None, rate=0.2),
    "muon": OptimizerKind(bytes=4, spreads=False),  # for matrices; its AdamW keeps 8 bytes for the rest
    # One value per row and one per column: half a byte for LoRA of rank 8, hardly anything for whole weights.
    "adafactor": OptimizerKind(bytes=1, betas=None, eps=None, spreads=False),
}


def with_setting(name: Literal["betas", "eps"]) -> tuple[str, ...]:
    """The optimizers that read this setting."""
    return tuple(key for key, kind in OPTIMIZERS.items() if getattr(kind, name) is not None)
