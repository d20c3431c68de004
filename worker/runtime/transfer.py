"""To the device and back without waiting: what a step reads is sent ahead of it, its figures are read when the device has gone on.

Reading a tensor of a GPU waits for everything that was ordered before it is copied, so a loop that reads the loss of the step
before in the middle of a step waits for the newest work too. Here the copy is ordered at the step's end into pinned memory and
an event is set behind it; reading waits for that event alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host's tensor on the device; to a GPU from pinned memory, so that nobody waits for the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class AsyncScalars:
    """Numbers of one step, any shapes and types, one after the other in float64 (which holds a float32 as it is)."""

    def __init__(self, numbers: Sequence[torch.Tensor]) -> None:
        flat = torch.cat([n.detach().reshape(-1).double() for n in numbers])
        self.host, self.there = flat, None
        if flat.is_cuda:
            self.host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
            self.host.copy_(flat, non_blocking=True)
            self.there = torch.cuda.Event()
            self.there.record()

    def read(self) -> torch.Tensor:
        """The numbers on the host, (n,), float64; waits until they have arrived, and for nothing that was ordered later."""
        if self.there is not None:
            self.there.synchronize()
        return self.host


def depth(device: torch.device) -> int:
    """How many steps may be on their way unread: on a GPU one, so that the device always has the next one to do."""
    return int(device.type == "cuda")
