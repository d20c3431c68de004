"""The processor: its memory is the machine's, and work is done when the call returns."""

from __future__ import annotations

import contextlib
import ctypes
import time

import torch

from app.machines.hardware import this_machine
from worker.runtime.devices._base import Device, DeviceEvent


class Moment:
    """A time: the work before it is done."""

    def __init__(self) -> None:
        self.seconds = time.perf_counter()

    def synchronize(self) -> None:
        """There is nothing to wait for."""

    def elapsed_time(self, end: Moment) -> float:
        return 1000 * (end.seconds - self.seconds)


class Cpu(Device):
    kind = "cpu"
    collectives = "gloo"
    activity = torch.profiler.ProfilerActivity.CPU

    def name(self, device: torch.device) -> str:
        return f"cpu ({this_machine().processor})"

    def peak_memory(self, device: torch.device) -> int:
        """Of this process, resident."""
        with open("/proc/self/status") as file:  # ru_maxrss would also hold the peak of the process that started us
            for line in file:
                if line.startswith("VmHWM"):
                    return int(line.split()[1]) * 1024
        return 0

    def release_memory(self) -> None:
        with contextlib.suppress(AttributeError, OSError):  # the allocator keeps what was freed, and the next model would come on top of it
            ctypes.CDLL(None).malloc_trim(0)

    def rng_state(self, device: torch.device) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: torch.device) -> None:
        torch.set_rng_state(state)

    def synchronize(self) -> None:
        """There is nothing to wait for."""

    def event(self, timing: bool = False) -> DeviceEvent:
        return Moment()
