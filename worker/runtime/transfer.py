"""Asynchronous copies: inputs of a step are sent ahead of it, and its metrics are read when the device has finished it.

Reading a GPU tensor synchronizes with all work enqueued before the copy, so a loop that reads the previous step's loss in the
middle of a step waits for the newest work too. Here the copy into pinned memory is enqueued at the step's end, followed by an
event; reading waits for that event alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from worker.runtime import devices


def pinned(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor from which a copy to the device does not wait: for a GPU, in pinned memory."""
    return tensor.pin_memory() if devices.is_gpu(device) else tensor


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on the device; to a GPU asynchronously, from pinned memory."""
    return pinned(tensor, device).to(device, non_blocking=True)


class AsyncScalars:
    """Values of one step, of any shapes and dtypes, concatenated in float64 (which represents float32 exactly)."""

    def __init__(self, numbers: Sequence[torch.Tensor]) -> None:
        flat = torch.cat([n.detach().reshape(-1).double() for n in numbers])
        self.host, self.there = flat, None
        if (gpu := devices.gpu_of(flat.device)) is not None:
            self.host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
            self.host.copy_(flat, non_blocking=True)
            self.there = gpu.event()

    def read(self) -> torch.Tensor:
        """The values on the host, (n,) float64; waits until they have arrived, but not for later work."""
        if self.there is not None:
            self.there.synchronize()
        return self.host


def depth(device: torch.device) -> int:
    """Number of steps in flight: one on a GPU, so that the device always has its next step."""
    return int(devices.is_gpu(device))
