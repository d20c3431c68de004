"""The kinds of devices that models compute on: the folder is the registry. A file here that defines a `Device` is a kind, and nothing
else of the worker but the kernels for GPUs names one (`tests/test_house.py`). `cuda` is ROCm's name too.

What the studio itself knows of a machine's GPUs is in `app/machines/gpus.py`, without torch.
"""

from __future__ import annotations

import torch

from app.kit.registry import classes_in
from worker.runtime.devices._base import Device, Gpu, Graph

__all__ = ["CPU", "DEVICES", "GPUS", "Device", "Gpu", "Graph", "best", "gpu", "gpu_of", "is_gpu", "of", "set_up"]

DEVICES: dict[str, Device] = {one.kind: one for one in (kind() for kind in classes_in(__name__, Device))}
"""Every kind by torch's name for it."""

CPU = DEVICES["cpu"]
GPUS = tuple(kind for kind, one in DEVICES.items() if isinstance(one, Gpu))
"""Names of those that are GPUs, in the order in which a job that may choose takes them. A tuple of words, which torch's compiler reads
in a layer as a constant."""


def of(device: torch.device) -> Device:
    """The kind of a device of torch's."""
    return DEVICES[device.type]


def is_gpu(device: torch.device) -> bool:
    return device.type in GPUS


def gpu_of(device: torch.device) -> Gpu | None:
    """The kind of a GPU; None for the CPU."""
    found = DEVICES[device.type]
    return found if isinstance(found, Gpu) else None


def gpu() -> Gpu | None:
    """The kind of GPU that torch can use here; None where there is none."""
    return next((one for one in DEVICES.values() if isinstance(one, Gpu) and one.is_available()), None)


def set_up() -> None:
    """Settings of torch for all that this process computes on GPUs of any kind; called before weights are loaded."""
    for one in DEVICES.values():
        if isinstance(one, Gpu):
            one.set_up()


def best() -> Device:
    """What computes here where nobody says otherwise: a GPU, or the CPU."""
    return gpu() or CPU
