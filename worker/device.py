"""Where and in what numbers a job computes, decided once and written down, so that a resumed job decides the same.

Measured choices. On CUDA: bf16, with frozen weights stored in bf16 and trained ones in float32. On a CPU with matrix units
(AMX): bf16 autocast, 1.25 to 1.35 times float32. On other CPUs: float32, although bf16 products are 1.5 times faster where
the CPU has AVX-512 BF16 (LoRA, 135 M: 215 against 137 tokens per processor second). There the loss fell more slowly over the
first steps (13.01 against 12.88 after two), because a small correction added to a value already rounded to bf16 is lost; a
person who wants the speed orders bf16.
"""

from __future__ import annotations

import contextlib
import os
import platform
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

import torch

from app.errors import DoesNotFit
from app.machine import this_machine, usable_cores
from app.spec import RunSettings
from app.strategies import Strategy


@dataclass(frozen=True)
class Engine:
    """The device and the number formats of one attempt."""

    device: torch.device
    name: str
    precision: Literal["fp32", "bf16"]
    frozen: torch.dtype  # how weights that do not learn are stored
    threads: int

    @property
    def compute(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Products in `compute`; a no-op in float32."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)

    def facts(self) -> dict[str, Any]:
        """What must be equal for a resumed job to be bit-exact."""
        packages = ("torch", "transformers", "peft", "tokenizers", "safetensors")
        return {
            "device": self.name,
            "precision": self.precision,
            "threads": self.threads,
            "world_size": 1,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in packages},
        }


def choose(run: RunSettings, strategy: Strategy, recorded: dict[str, Any] | None = None) -> Engine:
    """The engine for this machine. `recorded` are the facts of the checkpoint that is resumed: its number of threads is kept.

    Raises DoesNotFit when bf16 is ordered on a GPU that has none.
    """
    if torch.cuda.is_available():
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        if run.precision == "bf16" and not bf16:
            raise DoesNotFit("This GPU has no bf16.", way_out="Set precision to fp32 or auto.", param="precision")
        precision = "bf16" if bf16 and run.precision != "fp32" else "fp32"
        torch.backends.cuda.matmul.allow_tf32 = True
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return Engine(device, torch.cuda.get_device_name(device), precision, _frozen(precision, strategy), torch.get_num_threads())
    threads = int((recorded or {}).get("threads") or os.environ.get("OMP_NUM_THREADS") or usable_cores())
    torch.set_num_threads(max(1, threads))
    bf16 = run.precision == "bf16" or (run.precision == "auto" and this_machine().bf16_pays)
    precision = "bf16" if bf16 else "fp32"
    name = f"cpu ({this_machine().processor})"
    return Engine(torch.device("cpu"), name, precision, _frozen(precision, strategy), torch.get_num_threads())


def _frozen(precision: str, strategy: Strategy) -> torch.dtype:
    return torch.bfloat16 if precision == "bf16" and strategy.adapter else torch.float32


def peak_memory(device: torch.device) -> int:
    """Bytes: the card's peak of allocated memory, or the peak of this process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with open("/proc/self/status") as file:  # ru_maxrss would also hold the peak of the process that started us
        for line in file:
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return 0


def rng_tensors(device: torch.device) -> dict[str, torch.Tensor]:
    """The state of every generator that training draws from."""
    found = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def set_rng(tensors: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(tensors["cpu"])
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)
