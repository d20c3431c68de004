"""`python -m worker.runtime.list_gpus`: the GPUs that torch finds, as one line of JSON for `app/machines/gpus.py`."""

from __future__ import annotations

import json
from typing import Any

import torch

from worker.runtime import devices


def main() -> None:
    found = devices.gpu()
    print(json.dumps([card(properties) for properties in found.properties()] if found else []))


def card(properties: Any) -> dict[str, Any]:
    """Fields of `GpuCard`. Older builds for ROCm tell no UUID, or the same for all: the place on the PCI bus is of one card alone."""
    bus = ":".join(f"{getattr(properties, f'pci_{part}_id', 0):02x}" for part in ("domain", "bus", "device"))
    hip = torch.version.hip is not None
    return {
        "uuid": f"PCI-{bus}" if hip or not hasattr(properties, "uuid") else f"GPU-{properties.uuid}",
        "capability": None if hip else float(f"{properties.major}.{properties.minor}"),
        "memory_bytes": properties.total_memory,
        "name": properties.name,
        "hip": hip,
    }


if __name__ == "__main__":
    main()
