"""The rotary embedding of a config as GGUF files hold it: a base, and for Llama 3.1 and later one factor per frequency."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

LLAMA_3_POSITIONS = (8192, 4096, 16_384, 32_768)
"""What a model may have been trained on before its frequencies were stretched. Every Llama 3 has the first."""


def rope_of(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary embedding of the layers that see everything: `rope_theta`, `rope_type` and what that type needs."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    found = found.get("full_attention", found)
    return {"rope_theta": config.get("rope_theta", 10_000.0), "rope_type": "default", **found}


def rope_factors(config: dict[str, Any]) -> np.ndarray | None:
    """What the rotary frequencies of a Llama 3.1 are divided by, (head_dim / 2,); None where they are as usual.

    From `_compute_llama3_parameters` of transformers: low frequencies are divided by `factor`, high ones are kept.
    """
    rope = rope_of(config)
    if rope["rope_type"] != "llama3":
        return None
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    wavelengths = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
    old, low, high = rope["original_max_position_embeddings"], rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((old / wavelengths - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)


def llama3_of(factors: np.ndarray, config: dict[str, Any]) -> dict[str, Any] | None:
    """The `rope_parameters` whose factors are those of a file, (head_dim / 2,); None when no Llama 3 has them."""
    largest = float(factors.max())
    for positions in LLAMA_3_POSITIONS:
        rope = {"rope_type": "llama3", "rope_theta": rope_of(config)["rope_theta"], "factor": largest}
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": positions}
        expected = rope_factors({**config, "rope_parameters": rope})
        if expected is not None and expected.shape == factors.shape and np.allclose(expected, factors, rtol=1e-5):
            return rope
    return None
