"""This machine's hardware: cores, memory, GPU, and how fast it has trained so far. No torch."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.machines import gpus
from app.settings import get_settings

MEASURED = "measured"
"""The folder of what trainers measured on this machine, the only one outside their own work that they write to."""
CALIBRATION = f"{MEASURED}/calibration.json"
ARITHMETIC = f"{MEASURED}/arithmetic.json"
BF16_WORTHWHILE = 1.2
"""Minimum speed-up of bf16 products over fp32 at which a CPU uses them."""


class Pace(BaseModel):
    """How fast jobs of one kind run here: useful floating-point operations per second of a step; the fixed seconds of a job
    (loading libraries and weights, reading rows, writing files); and the time of computations `beside` its steps (scores,
    answers, checkpoints), relative to what they would take at the speed of a step."""

    model_config = ConfigDict(frozen=True)

    operations_per_second: float = Field(gt=0, allow_inf_nan=False)
    fixed_seconds: float = Field(gt=0, allow_inf_nan=False)
    beside: float = Field(1.0, gt=0, allow_inf_nan=False)


def _middle(paces: Sequence[Pace], how: Callable[[list[float]], float]) -> Pace:
    return Pace(**{name: how([getattr(pace, name) for pace in paces]) for name in Pace.model_fields})


class Machine(BaseModel):
    """Memory in bytes. `paces` are what past jobs measured, by `kind_of_work` on a device."""

    model_config = ConfigDict(frozen=True)

    cores: int
    memory_bytes: int
    processor: str = ""
    bf16_pays: bool = Field(False, description="bf16 products are faster than fp32 ones (matrix units, or a GPU)")
    matrix_units: bool = Field(False, description="the processor multiplies bf16 in tiles (AMX)")
    bf16_measured: float | None = Field(None, description="how many times faster a bf16 product is than an fp32 one on this CPU")
    gpu_name: str | None = None
    gpu_memory_bytes: int | None = None
    gpu_capability: float | None = Field(None, description="NVIDIA's compute capability, where its driver tells: 8.9 is Ada, 9.0 Hopper")
    processes: int = Field(1, description="how many train one job together, each with a GPU or with its share of this memory")
    cards: tuple[gpus.GpuCard, ...] = Field((), description="the GPUs that workers here may use")
    labels: tuple[str, ...] = Field((), description="the labels of its workers")
    paces: dict[str, Pace] = Field(default_factory=dict)

    @property
    def device(self) -> str:
        """Name of the device that computes: a calibration folder may be shared by several machines."""
        one = self.gpu_name or f"{self.cores} cores of {self.processor}"
        return one if self.processes == 1 else f"{self.processes} × {one}"

    def pace(self, work: str) -> tuple[Pace | None, bool]:
        """The pace of this kind of work here, and whether it was measured: if not, the median of similar work (other strategies
        on the same kind of model, with the same recipe and dtype)."""
        own = f"{self.device} · "
        if found := self.paces.get(own + work):
            return found, True
        rest = work.partition(" · ")[2]
        near = [p for key, p in self.paces.items() if key.startswith(own) and key.removeprefix(own).partition(" · ")[2] == rest]
        if not near:
            return None, False
        return _middle(near, statistics.median), False

    @property
    def cuda(self) -> bool:
        return self.gpu_memory_bytes is not None

    def on(self, device: str) -> Machine:
        """This machine as a job sees it that computes on `device` (auto, cpu or cuda): for cpu, without its GPU."""
        if device != "cpu" or not self.cuda:
            return self
        pays = self.matrix_units if self.bf16_measured is None else self.bf16_measured >= BF16_WORTHWHILE
        return self.model_copy(update={"gpu_name": None, "gpu_memory_bytes": None, "gpu_capability": None, "cards": (), "bf16_pays": pays})

    @property
    def training_memory_bytes(self) -> int:
        """The memory that each process of a job has to fit into."""
        return self.gpu_memory_bytes or self.memory_bytes // self.processes


def this_machine() -> Machine:
    """This machine with its current calibration; the hardware is looked up once."""
    facts, gain = _facts(), read_bf16()
    pays = facts.bf16_pays if gain is None or facts.cuda else gain >= BF16_WORTHWHILE
    known: dict[str, Any] = {
        "paces": read_calibration(),
        "bf16_measured": gain,
        "bf16_pays": pays,
        "processes": get_settings().gpus_per_job,
    }
    known |= {"labels": get_settings().worker_labels}
    return facts.model_copy(update=known)


def trained_on() -> Machine:
    """The machine that this worker's jobs train on: this one, or one that an engine starts them on, as LUTHIER_LAUNCHER_MACHINE says."""
    here, told = this_machine(), get_settings().launcher_machine
    if told is None:
        return here
    cards = tuple(gpus.GpuCard(str(n), told.gpu_capability, told.gpu_memory_bytes, told.gpu_name) for n in range(told.gpus))
    facts = {"cores": told.cores, "memory_bytes": told.memory_bytes, "cards": cards, "processor": "", "paces": {}, "bf16_measured": None}
    facts |= {"gpu_name": told.gpu_name or None, "gpu_memory_bytes": told.gpu_memory_bytes if cards else None}
    facts |= {"gpu_capability": told.gpu_capability, "bf16_pays": bool(cards), "matrix_units": False}
    return here.model_copy(update=facts)


@functools.cache
def _facts() -> Machine:
    name, memory, capability = gpus.first()
    info = _read("/proc/cpuinfo")
    processor = next((line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")), platform.machine())
    return Machine(
        cores=usable_cores(),
        memory_bytes=usable_memory(),
        processor=processor,
        bf16_pays=memory is not None or "amx_bf16" in info or "avx512_bf16" in info,
        matrix_units="amx_bf16" in info,
        gpu_name=name,
        gpu_memory_bytes=memory,
        gpu_capability=capability,
        cards=tuple(gpus.visible_cards()),
    )


def usable_cores() -> int:
    """Cores this process may use, by its affinity and its control group."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").strip().partition(" ")
    if not quota:
        quota, period = _read("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").strip(), _read("/sys/fs/cgroup/cpu/cpu.cfs_period_us").strip()
    with contextlib.suppress(ValueError, ZeroDivisionError):
        if int(quota) > 0:
            cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(cores, 1)


def usable_memory() -> int:
    """Bytes of memory, limited by the control group."""
    total = psutil.virtual_memory().total
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(ValueError):
            total = min(total, int(_read(name)))
    return total


def read_bf16() -> float | None:
    """The bf16 speed-up that a trainer measured on this CPU; None before."""
    try:
        return float(json.loads((get_settings().data_dir / ARITHMETIC).read_text())[_facts().processor])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def note_bf16(gain: float) -> None:
    """Store that measurement for this CPU."""
    _write(ARITHMETIC, {_facts().processor: round(gain, 3)})


def kind_of_work(strategy: str, architecture: str, recipe: str, precision: str) -> str:
    """The key of a pace: a machine's speed differs with each of these."""
    return " · ".join((strategy, architecture, recipe, precision))


def read_calibration() -> dict[str, Pace]:
    """What past jobs measured, by device and kind of work; empty before the first. Unreadable entries are skipped."""
    try:
        found = json.loads((get_settings().data_dir / CALIBRATION).read_text())
        read = {}
        for key, value in found.items():
            with contextlib.suppress(ValidationError):
                read[str(key)] = Pace.model_validate(value)
        return read
    except (OSError, ValueError, AttributeError):
        return {}


def calibrate(work: str, new: Pace, device: str = "auto") -> None:
    """Record the speed of a finished job on `device`; the stored pace moves half of the way to the new one."""
    paces, key = read_calibration(), f"{this_machine().on(device).device} · {work}"
    paces[key] = _middle([paces.get(key, new), new], statistics.fmean)
    _write(CALIBRATION, {name: pace.model_dump() for name, pace in paces.items()})


def _write(name: str, value: object) -> None:
    get_settings().folder(MEASURED)
    path = get_settings().data_dir / name
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value))
    os.replace(temporary, path)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
