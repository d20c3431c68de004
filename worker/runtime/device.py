"""Chooses the device and dtypes of a job, once, and records them, so that a resumed job chooses the same.

Measured choices. On CUDA: bf16, with frozen weights stored in bf16 and trained ones in float32; on GPUs before Ampere (T4, V100,
RTX 20) fp16 instead, with a scaled loss (`worker/training/backends/loss_scaled.py`). On a CPU: bf16 where products are
measured to be faster in it (AMX, AVX-512 BF16) and the strategy trains as well in it as in float32: LoRA and its nearest
relatives, whose correction is added before the sum is rounded (`worker/modeling/fused_lora.py`), and full fine-tuning with
float32 master weights. With peft's own layers bf16 was as fast, but trained more slowly: a small correction added to a value
already rounded to bf16 is lost.
"""

from __future__ import annotations

import contextlib
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
from app.kit.token_meter import TokenMeter
from app.machines.hardware import BF16_WORTHWHILE, Machine, note_bf16, this_machine, usable_cores
from app.planning.memory import FLOOR_CUDA_BYTES, parts_of
from app.run_settings import RunSettings
from app.settings import get_settings
from app.strategies import Strategy
from worker import kernels
from worker.kernels.gpu import fp8
from worker.runtime import devices, distributed
from worker.runtime.thread_parallel import ThreadParallel

ARITHMETIC = 3
"""Version of the arithmetic of a step, increased when results of many strategies change in their last digits: a job begun before
continues, with a remark."""


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The dtype of products, by precision."""


@dataclass(frozen=True)
class Compute:
    """The device and dtypes of one attempt."""

    device: torch.device
    name: str
    precision: Literal["fp32", "bf16", "fp16"]
    frozen: torch.dtype  # how frozen weights are stored
    threads: int
    fp8: bool = False  # frozen layers are quantized once the strategy is attached (worker/kernels/gpu/fp8.py)
    abreast: ThreadParallel = field(init=False, repr=False, compare=False)
    meter: TokenMeter = field(default_factory=TokenMeter, init=False, repr=False, compare=False)
    """Tokens of the answers that this attempt had a model write."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "abreast", ThreadParallel(self.threads))

    @property
    def compute(self) -> torch.dtype:
        return DTYPES[self.precision]

    @property
    def rounding(self) -> str:
        """What the last digits of results depend on that are kept for later attempts or jobs."""
        return self.precision if kernels.allowed() else f"{self.precision} plain"

    @property
    def framed(self) -> bool:
        """Whether packs are padded to one shape: on a GPU in bf16, whose attention takes a table of sequence ends."""
        return devices.is_gpu(self.device) and self.precision == "bf16"

    def parts(self, tokens: int) -> int:
        """How many parts of a pack of `tokens` are computed side by side: one on a GPU, and with `LUTHIER_KERNELS=plain`."""
        return parts_of(tokens, self.threads) if self.device.type == "cpu" and kernels.allowed() else 1

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast of products to `compute`; a no-op in float32."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.compute, cache_enabled=False)

    def facts(self) -> dict[str, Any]:
        """What must be equal for a resumed job to be bitwise reproducible."""
        packages = ("torch", "transformers", "peft", "tokenizers", "safetensors", "numba")
        return {
            "device": self.name,
            "precision": self.precision,
            "threads": self.threads,
            "world_size": distributed.size(),
            "engine": ARITHMETIC,
            **({} if kernels.allowed() else {"kernels": "plain"}),
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in packages},
        }


def choose(run: RunSettings, strategy: Strategy, recorded: dict[str, Any] | None = None) -> Compute:
    """The device and dtypes for this machine. `recorded` are the facts of the checkpoint that is resumed: its number of threads
    is kept.

    Raises DoesNotFit when bf16 is requested on a GPU without it, fp8 where it is not supported, or torch finds no GPU where the
    driver shows one or the run asks for one.
    """
    gpu = devices.gpu() if run.device != "cpu" else None
    if run.frozen_weights == "fp8" and not kernels.allowed():
        raise _no_fp8("Products in fp8 are computed by a kernel, and LUTHIER_KERNELS is plain.")
    if run.frozen_weights == "fp8" and gpu is None:
        raise _no_fp8("Products in fp8 need an NVIDIA GPU.")
    if gpu is not None:
        bf16 = gpu.has_bf16()
        if run.precision == "bf16" and not bf16:
            raise DoesNotFit("This GPU has no bf16.", hint="Set precision to fp32 or auto.", param="precision")
        # fp16 needs a scaled loss, which sharded weights do not support.
        precision: Literal["bf16", "fp16", "fp32"] = "bf16" if bf16 else "fp32" if distributed.spreads(strategy) else "fp16"
        precision = "fp32" if run.precision == "fp32" else precision
        device = gpu.use(int(os.environ.get("LOCAL_RANK", "0")))
        if limit := get_settings().gpu_memory_bytes:
            gpu.limit_memory(device, min(1.0, (limit - FLOOR_CUDA_BYTES) / gpu.memory(device)[1]))
        in_fp8 = run.frozen_weights == "fp8"
        if in_fp8 and (reason := fp8.why_not(device) or (None if precision == "bf16" else "Products in fp8 go with bf16 alone.")):
            raise _no_fp8(reason)
        return Compute(device, gpu.name(device), precision, _frozen(precision, strategy), torch.get_num_threads(), in_fp8)
    if run.device != "cpu" and this_machine().cuda and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        raise DoesNotFit(
            "There is a GPU, but torch cannot use it.",
            hint="`luthier doctor` shows why. To train on the processor all the same, set the run's device to cpu, or "
            "CUDA_VISIBLE_DEVICES to nothing.",
        )
    if run.device not in ("auto", "cpu"):
        raise DoesNotFit("The device cuda needs an NVIDIA GPU, and there is none here.", hint="Set device to auto or cpu.", param="device")
    threads = int((recorded or {}).get("threads") or os.environ.get("OMP_NUM_THREADS") or usable_cores())
    torch.set_num_threads(max(1, threads))
    on_cpu = run.precision if run.precision != "auto" else _precision_here(strategy, recorded or {})
    device = torch.device("cpu")
    return Compute(device, devices.CPU.name(device), on_cpu, _frozen(on_cpu, strategy), torch.get_num_threads())


def _no_fp8(reason: str) -> DoesNotFit:
    return DoesNotFit(reason, hint="Set frozen_weights to auto.", param="frozen_weights")


def _precision_here(strategy: Strategy, recorded: dict[str, Any]) -> Literal["fp32", "bf16"]:
    """The choice of `auto` on a CPU: the dtype of the checkpoint that is resumed, or bf16 where it was measured to be faster and
    the strategy trains as well in it."""
    if recorded.get("precision") in ("fp32", "bf16"):
        return recorded["precision"]
    return "bf16" if strategy.trains_in_bf16() and bf16_pays_here() else "fp32"


def bf16_pays_here() -> bool:
    """Whether bf16 products are faster than float32 ones on this CPU, measured once and cached."""
    machine = this_machine()
    if machine.bf16_measured is None:
        note_bf16(_bf16_gain())
        machine = this_machine()
    return (machine.bf16_measured or 0.0) >= BF16_WORTHWHILE


def _bf16_gain() -> float:
    """Speed-up of a product of a training step's size in bf16: the best of a few alternating runs of each."""
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
    """This machine with the memory that a job may use now. On a GPU: what is free, plus what this process holds already; a
    playground or another job may have the rest. All processes of a job decide by the whole card, because they must decide alike."""
    machine, gpu = this_machine().on(device.type).model_copy(update={"processes": distributed.size()}), devices.gpu_of(device)
    if gpu is None:
        return machine
    free, total = gpu_memory(device)
    usable = total if distributed.size() > 1 else free + gpu.reserved_memory(device)
    return machine.model_copy(update={"gpu_memory_bytes": usable})


def gpu_memory(device: torch.device) -> tuple[int, int]:
    """Bytes of a GPU that are free beside what this process has reserved, and all of them; no more than the settings allow."""
    gpu = devices.gpu_of(device)
    assert gpu is not None
    free, total = gpu.memory(device)
    limit = get_settings().gpu_memory_bytes
    if limit is None or limit >= total:
        return free, total
    return min(free, max(0, limit - gpu.reserved_memory(device))), limit


def rng_tensors(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of all random generators that training draws from."""
    return {one.kind: one.rng_state(device) for one in (devices.CPU, devices.of(device))}


def set_rng(tensors: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(tensors["cpu"])
    own = devices.of(device)
    if own.kind in tensors:  # a job that began on another kind of device has no state of this one
        own.set_rng_state(tensors[own.kind], device)


def release(device: torch.device) -> None:
    """Return unused memory of the allocator to the device."""
    gc.collect()
    devices.of(device).release_memory()
