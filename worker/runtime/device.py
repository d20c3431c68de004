"""Where and in what numbers a job computes, decided once and written down, so that a resumed job decides the same.

Measured choices. On CUDA: bf16, with frozen weights stored in bf16 and trained ones in float32; fp16 in its place on cards before Ampere
(T4, V100, RTX 20), with a factor on the loss (`worker/training/loss_scale.py`). On a CPU: bf16 where a
product is measured to be faster in it (AMX, AVX-512 BF16) and the strategy learns as well in it as in float32: LoRA and its
nearest relatives, whose correction is added before the sum is rounded (`worker/modeling/fused_lora.py`), and those that train whole weights
kept in float32. With peft's own layers bf16 was as fast, but learnt more slowly: a small correction added to a value
already rounded to bf16 is lost.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
import platform
import time
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, Literal

import torch

from app.errors import DoesNotFit
from app.machines.hardware import BF16_WORTHWHILE, Machine, note_bf16, this_machine, usable_cores
from app.planning.memory import parts_of
from app.run_settings import RunSettings
from app.strategies import Strategy
from worker.kernels.gpu import fp8
from worker.runtime import distributed
from worker.runtime.thread_parallel import ThreadParallel

ARITHMETIC = 3
"""Raised when a step is computed otherwise for many strategies, so that its last digits differ: a job begun before goes on, and is told."""


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What products are computed in."""


@dataclass(frozen=True)
class Compute:
    """The device and the number formats of one attempt."""

    device: torch.device
    name: str
    precision: Literal["fp32", "bf16", "fp16"]
    frozen: torch.dtype  # how weights that do not learn are stored
    threads: int
    fp8: bool = False  # frozen layers are kept and multiplied in fp8 once the strategy is attached (worker/kernels/gpu/fp8.py)
    abreast: ThreadParallel = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "abreast", ThreadParallel(self.threads))

    @property
    def compute(self) -> torch.dtype:
        return DTYPES[self.precision]

    @property
    def framed(self) -> bool:
        """Packs are filled up to one shape: on a GPU in bf16, where the attention takes a table of sequence ends."""
        return self.device.type == "cuda" and self.precision == "bf16"

    def parts(self, tokens: int) -> int:
        """How many parts of a pack of `tokens` are computed side by side: one on a GPU."""
        return parts_of(tokens, self.threads) if self.device.type == "cpu" else 1

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Products in `compute`; a no-op in float32."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.compute, cache_enabled=False)

    def facts(self) -> dict[str, Any]:
        """What must be equal for a resumed job to be bit-exact."""
        packages = ("torch", "transformers", "peft", "tokenizers", "safetensors", "numba")
        return {
            "device": self.name,
            "precision": self.precision,
            "threads": self.threads,
            "world_size": distributed.size(),
            "engine": ARITHMETIC,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in packages},
        }


def choose(run: RunSettings, strategy: Strategy, recorded: dict[str, Any] | None = None) -> Compute:
    """The engine for this machine. `recorded` are the facts of the checkpoint that is resumed: its number of threads is kept.

    Raises DoesNotFit when bf16 is ordered on a GPU that has none, fp8 where it cannot be multiplied, or torch finds no GPU where the
    driver shows one or the run asks for one.
    """
    on_gpu = run.device != "cpu" and torch.cuda.is_available()
    if run.frozen_weights == "fp8" and not on_gpu:
        raise _no_fp8("Products in fp8 need an NVIDIA GPU.")
    if on_gpu:
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        if run.precision == "bf16" and not bf16:
            raise DoesNotFit("This GPU has no bf16.", hint="Set precision to fp32 or auto.", param="precision")
        # Where there is no bf16 its range is made up for by a factor on the loss, which weights shared out to processes know nothing of.
        precision: Literal["bf16", "fp16", "fp32"] = "bf16" if bf16 else "fp32" if distributed.spreads(strategy) else "fp16"
        precision = "fp32" if run.precision == "fp32" else precision
        torch.backends.cuda.matmul.allow_tf32 = True
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        in_fp8 = run.frozen_weights == "fp8"
        if in_fp8 and (reason := fp8.why_not(device) or (None if precision == "bf16" else "Products in fp8 go with bf16 alone.")):
            raise _no_fp8(reason)
        name = torch.cuda.get_device_name(device)
        return Compute(device, name, precision, _frozen(precision, strategy), torch.get_num_threads(), in_fp8)
    if run.device != "cpu" and this_machine().cuda and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        raise DoesNotFit(
            "There is a GPU, but torch cannot use it.",
            hint="`luthier doctor` shows why. To train on the processor all the same, set the run's device to cpu, or "
            "CUDA_VISIBLE_DEVICES to nothing.",
        )
    if run.device == "cuda":
        raise DoesNotFit("The device cuda needs an NVIDIA GPU, and there is none here.", hint="Set device to auto or cpu.", param="device")
    threads = int((recorded or {}).get("threads") or os.environ.get("OMP_NUM_THREADS") or usable_cores())
    torch.set_num_threads(max(1, threads))
    on_cpu = run.precision if run.precision != "auto" else _precision_here(strategy, recorded or {})
    name = f"cpu ({this_machine().processor})"
    return Compute(torch.device("cpu"), name, on_cpu, _frozen(on_cpu, strategy), torch.get_num_threads())


def _no_fp8(reason: str) -> DoesNotFit:
    return DoesNotFit(reason, hint="Set frozen_weights to auto.", param="frozen_weights")


def _precision_here(strategy: Strategy, recorded: dict[str, Any]) -> Literal["fp32", "bf16"]:
    """What `auto` takes on a CPU: the format of the checkpoint that is resumed, or bf16 where it was measured to be faster and
    the strategy learns as well in it."""
    if recorded.get("precision") in ("fp32", "bf16"):
        return recorded["precision"]
    return "bf16" if strategy.learns_in_bf16() and bf16_pays_here() else "fp32"


def bf16_pays_here() -> bool:
    """Whether bf16 products beat float32 ones on this CPU, measured once and kept for the studio."""
    machine = this_machine()
    if machine.bf16_measured is None:
        note_bf16(_bf16_gain())
        machine = this_machine()
    return (machine.bf16_measured or 0.0) >= BF16_WORTHWHILE


def _bf16_gain() -> float:
    """How many times faster a product of a training step's size is in bf16; the best of a few tries of each, in turn."""
    best = {torch.float32: math.inf, torch.bfloat16: math.inf}
    pairs = {t: (torch.ones(512, 576, dtype=t), torch.ones(1536, 576, dtype=t)) for t in best}
    for _ in range(8):
        for kind, (x, weight) in pairs.items():
            began = time.process_time()
            torch.nn.functional.linear(x, weight)
            best[kind] = min(best[kind], time.process_time() - began)
    return best[torch.float32] / max(best[torch.bfloat16], 1e-9)


def _frozen(precision: str, strategy: Strategy) -> torch.dtype:
    return DTYPES[precision] if strategy.adapter else torch.float32


def memory_here(device: torch.device) -> Machine:
    """This machine with what a job may take of it now. On a GPU: what is free, and what this process holds already; a playground
    or another job beside it may have the rest. Several processes all decide by the whole card, since they must decide alike."""
    machine = this_machine().on(device.type).model_copy(update={"processes": distributed.size()})
    if device.type != "cuda":
        return machine
    free, total = torch.cuda.mem_get_info(device)
    usable = total if distributed.size() > 1 else free + torch.cuda.memory_reserved(device)
    return machine.model_copy(update={"gpu_memory_bytes": usable})


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


def release(device: torch.device) -> None:
    """Give back the memory of what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:  # the allocator keeps what was freed, and the next model would come on top of it
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)
