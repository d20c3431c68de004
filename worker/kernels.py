"""Faster forms of layers that transformers writes out step by step. Same formula, same weights, same names."""

from __future__ import annotations

import torch
import torch.nn.functional as F

PLAIN_NORMS = frozenset(
    f"{family}RMSNorm" for family in ("Llama", "Mistral", "Mixtral", "Qwen2", "Qwen3", "Qwen3Moe", "SmolLM3", "Granite", "Phi3")
)
"""Norms whose formula is weight · x / sqrt(mean(x²) + eps). Gemma's, which adds 1 to the weight, is not among them."""


def use_fused_norms(model: torch.nn.Module) -> int:
    """Compute root-mean-square norms in one kernel instead of six. Returns how many were switched.

    Measured per processor second in float32, LoRA on a 135 M model: no difference (137 and 137 tokens). It is kept for bf16
    autocast, where a prototype of 14 M gained a quarter, and for GPUs, where it saves kernels.
    """
    found = [m for m in model.modules() if type(m).__name__ in PLAIN_NORMS]
    for norm in found:
        norm.forward = _Fused(norm)
    return len(found)


class _Fused:
    """The forward of one norm. A class rather than a closure, so that a model that holds it can be copied."""

    def __init__(self, norm: torch.nn.Module) -> None:
        self.norm = norm

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        weight = self.norm.weight
        if weight.dtype == hidden.dtype:
            return F.rms_norm(hidden, (hidden.shape[-1],), weight, self.norm.variance_epsilon)
        return F.rms_norm(hidden, (hidden.shape[-1],), weight.to(hidden.dtype), self.norm.variance_epsilon)


def recompute_layers(model: torch.nn.Module, count: int) -> int:
    """Have the first `count` blocks recompute their activations in the backward pass. Returns how many do."""
    if count <= 0:
        return 0
    model.gradient_checkpointing_enable({"use_reentrant": False})
    blocks = [m for m in model.modules() if hasattr(m, "_gradient_checkpointing_func") and hasattr(type(m), "gradient_checkpointing")]
    for place, block in enumerate(blocks):
        block.gradient_checkpointing = place < count
    return min(count, len(blocks))
