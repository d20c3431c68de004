"""The optimizers that a job may take: what each keeps, needs and reads of its settings. `worker/training/optimizers.py` makes them."""

from __future__ import annotations

from typing import Literal, NamedTuple

Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "lion", "muon", "adafactor"]


class Kind(NamedTuple):
    """`bytes` is what it keeps of each number that learns, and `rate` the share of AdamW's learning rate that suits it."""

    bytes: int
    betas: tuple[float, float] | None = (0.9, 0.999)
    eps: float | None = 1e-8
    needs_gpu: bool = False
    spreads: bool = True  # a process that holds some rows of a weight can move them alone
    rate: float = 1.0


OPTIMIZERS: dict[str, Kind] = {
    "adamw": Kind(bytes=8),
    "adamw_8bit": Kind(bytes=2, needs_gpu=True),
    "paged_adamw_8bit": Kind(bytes=2, needs_gpu=True, spreads=False),
    # A sign moves every number by the whole rate: 3 to 10 times less than AdamW's (Chen et al. 2023, section 5).
    "lion": Kind(bytes=4, betas=(0.9, 0.99), eps=None, rate=0.2),
    "muon": Kind(bytes=4, spreads=False),  # of matrices; its AdamW keeps 8 bytes of the rest
    # A number a row and one a column: half a byte for LoRA of rank 8, hardly anything for whole weights.
    "adafactor": Kind(bytes=1, betas=None, eps=None, spreads=False),
}


def with_setting(name: Literal["betas", "eps"]) -> tuple[str, ...]:
    """The optimizers that read it."""
    return tuple(key for key, kind in OPTIMIZERS.items() if getattr(kind, name) is not None)
