"""Kernels of our own, for the CPU and for CUDA, and the switch that turns all of them off."""

from __future__ import annotations

from app.settings import get_settings


def allowed() -> bool:
    """Whether fast paths may be taken: kernels, fused layers, threads over the parts of a pack, compiled blocks. Not with
    `LUTHIER_KERNELS=plain`, where a job computes what torch, transformers and peft compute, to find out whether a fast path is wrong."""
    return get_settings().kernels == "auto"
