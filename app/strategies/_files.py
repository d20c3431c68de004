"""Reads and writes an adapter's folder: `adapter_config.json` and `adapter_model.safetensors`, in peft's layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NEW_TOKENS = "new_tokens.safetensors"
"""The rows of the tokens that a job added, next to an adapter (`worker/modeling/new_tokens.py`)."""


def write_adapter(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Write both files into an existing folder. Sets become sorted lists; tensors are stored contiguously."""
    from safetensors.torch import save_file

    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    (folder / CONFIG).write_text(json.dumps(plain, indent=2, default=str) + "\n", encoding="utf-8")
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / WEIGHTS)


def read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    return config
