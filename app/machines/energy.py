"""The energy that GPUs have used, as their driver counts it (NVML, Volta and later). No package: three functions of its library.

A GPU that several processes use is counted whole for each of them, and a MIG instance has no counter of its own.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

LIBRARY = "libnvidia-ml.so.1"


@functools.cache
def _nvml() -> Any:
    """The library, ready; None where there is no driver."""
    try:
        library = ctypes.CDLL(LIBRARY)
        return library if library.nvmlInit_v2() == 0 else None
    except (OSError, AttributeError):
        return None


def joules_of(uuid: str) -> float | None:
    """Since the driver was loaded; None where the device does not count."""
    nvml, device, millijoules = _nvml(), ctypes.c_void_p(), ctypes.c_ulonglong()
    if nvml is None or nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(device)) != 0:
        return None
    if nvml.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(millijoules)) != 0:
        return None
    return millijoules.value / 1000.0


class Meter:
    """What these GPUs use from now on."""

    def __init__(self, gpus: Sequence[str]) -> None:
        self.began = {gpu: joules_of(gpu) for gpu in gpus}

    def joules(self) -> float | None:
        """None unless each of them counts, and where there is none."""
        found = [(joules_of(gpu), began) for gpu, began in self.began.items()]
        told = [now - began for now, began in found if now is not None and began is not None]
        return sum(told) if told and len(told) == len(found) else None
