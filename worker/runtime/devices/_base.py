"""What is asked of a kind of device, beyond what torch does alike on all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch


class Graph(Protocol):
    """Captured operations, which `replay` repeats on whatever their inputs hold now; `out` is their result."""

    out: torch.Tensor

    def replay(self) -> None: ...


class DeviceEvent(Protocol):
    """A point in a device's work."""

    def synchronize(self) -> None:
        """Wait until the work before it is done."""

    def elapsed_time(self, end: Any) -> float:
        """Milliseconds from this one to `end`; both were made with `timing`."""


class Device(ABC):
    """One kind of device; there is one object of it. Memory is in bytes."""

    kind: ClassVar[str]
    """torch's name, as the `type` of a `torch.device`; a checkpoint keeps the state of its random generator under it."""
    collectives: ClassVar[str]
    """The backend of torch.distributed that adds up its tensors."""
    activity: ClassVar[torch.profiler.ProfilerActivity]
    """What the profiler records of it."""

    @abstractmethod
    def name(self, device: torch.device) -> str:
        """What its maker calls it."""

    @abstractmethod
    def peak_memory(self, device: torch.device) -> int:
        """The most that this process had in use."""

    @abstractmethod
    def release_memory(self) -> None:
        """Return what the allocator holds and nothing uses."""

    @abstractmethod
    def rng_state(self, device: torch.device) -> torch.Tensor:
        """The state of its random generator."""

    @abstractmethod
    def set_rng_state(self, state: torch.Tensor, device: torch.device) -> None: ...

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until all work that was given to it is done."""

    @abstractmethod
    def event(self, timing: bool = False) -> DeviceEvent:
        """An event behind the work that was given to it so far."""


class Gpu(Device):
    """A device with memory of its own, which works on while the host goes on: what is copied to it is pinned, and results are waited for.

    The defaults are right for a kind whose module in torch (`torch.get_device_module`) has the names of `torch.cuda`, as that of
    Intel's GPUs has: its file says how it is called, and what is different.
    """

    @property
    def module(self) -> Any:
        return torch.get_device_module(self.kind)

    def is_available(self) -> bool:
        """Whether torch can use one here."""
        return bool(self.module.is_available())

    def count(self) -> int:
        return int(self.module.device_count())

    def properties(self) -> list[Any]:
        """torch's own description of each."""
        return [self.module.get_device_properties(place) for place in range(self.count())]

    def use(self, place: int) -> torch.device:
        """The one with this number, on which the process computes from now on."""
        device = torch.device(self.kind, place)
        self.module.set_device(device)
        return device

    def set_up(self) -> None:
        """Settings of torch for all that this process computes on them; called before weights are loaded."""

    def name(self, device: torch.device) -> str:
        return str(self.module.get_device_name(device))

    def capability(self, device: torch.device) -> tuple[int, int] | None:
        """Its generation where the maker numbers them, as NVIDIA's compute capability does; else None."""
        return None

    def has_bf16(self) -> bool:
        """Whether the one in use has bf16 products that are not emulated."""
        return bool(self.module.is_bf16_supported(including_emulation=False))

    def memory(self, device: torch.device) -> tuple[int, int]:
        """(what no process has reserved, all there is)."""
        free, total = self.module.mem_get_info(device)
        return free, total

    def reserved_memory(self, device: torch.device) -> int:
        """What this process's allocator holds, used or not."""
        return int(self.module.memory_reserved(device))

    def peak_memory(self, device: torch.device) -> int:
        return int(self.module.max_memory_allocated(device))

    def limit_memory(self, device: torch.device, share: float) -> None:
        """Let this process take no more than a share of all there is."""
        self.module.set_per_process_memory_fraction(share, device)

    def release_memory(self) -> None:
        self.module.empty_cache()

    def rng_state(self, device: torch.device) -> torch.Tensor:
        found: torch.Tensor = self.module.get_rng_state(device)
        return found

    def set_rng_state(self, state: torch.Tensor, device: torch.device) -> None:
        self.module.set_rng_state(state, device)

    def synchronize(self) -> None:
        self.module.synchronize()

    def event(self, timing: bool = False) -> DeviceEvent:
        made: DeviceEvent = self.module.Event(enable_timing=True) if timing else self.module.Event()
        made.record()  # type: ignore[attr-defined]
        return made

    def capture(self, run: Callable[[], torch.Tensor], *, warm: bool = True) -> Graph:
        """The operations of `run`, which is called once before, `warm`, unless the same was computed already. Raises NotImplementedError
        for a kind that captures none."""
        raise NotImplementedError(f"operations of {self.kind} devices are not captured")
