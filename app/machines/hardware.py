"""This machine's hardware: cores, memory, GPU, and how fast it has trained so far. No torch."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil
from pydantic import BaseModel, ConfigDict, Field, ValidationError

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
        return self.model_copy(update={"gpu_name": None, "gpu_memory_bytes": None, "gpu_capability": None, "bf16_pays": pays})

    @property
    def training_memory_bytes(self) -> int:
        """The memory that each process of a job has to fit into."""
        return self.gpu_memory_bytes or self.memory_bytes // self.processes


def this_machine() -> Machine:
    """This machine with its current calibration; the hardware is looked up once."""
    facts, gain = _facts(), read_bf16()
    pays = facts.bf16_pays if gain is None or facts.cuda else gain >= BF16_WORTHWHILE
    known = {"paces": read_calibration(), "bf16_measured": gain, "bf16_pays": pays, "processes": get_settings().gpus_per_job}
    return facts.model_copy(update=known)


@functools.cache
def _facts() -> Machine:
    name, memory, capability = _gpu()
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


CUDA_ORDER = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
"""The environment of every process that uses a GPU, whatever ours says: GPUs are numbered as nvidia-smi numbers them, from which estimates
take the memory. By default CUDA begins with the fastest, in an order that nothing but CUDA knows."""


class _Card(NamedTuple):
    """A GPU as nvidia-smi reports it."""

    uuid: str
    capability: float | None
    memory_bytes: int
    name: str


def _gpu() -> tuple[str | None, int | None, float | None]:
    """Name, memory and compute capability of the GPU that a process started here uses: the first of CUDA_VISIBLE_DEVICES, or of all,
    numbered by PCI bus (`CUDA_ORDER`). Of a GPU with MIG, the memory of the instance."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    cards = _cards()
    if visible == "" or not cards:
        return None, None, None
    wanted = (visible or "0").split(",")[0].strip()
    instances = _mig_instances()
    if wanted.startswith("MIG-"):
        card, memory = next(((number, memory) for number, uuid, memory in instances if uuid.startswith(wanted)), (None, None))
        found = cards[card] if card is not None else None
    else:
        place = next((i for i, card in enumerate(cards) if str(i) == wanted or (len(wanted) > 4 and card.uuid.startswith(wanted))), None)
        memory = next((memory for number, _, memory in instances if number == place), None)
        found = cards[place] if place is not None else None
    if found is None:
        return None, None, None
    return found.name, min(memory or found.memory_bytes, get_settings().gpu_memory_bytes or sys.maxsize), found.capability


def visible_gpus() -> tuple[str, ...]:
    """UUIDs of the GPUs that processes started here use, in their order, or of the MIG instances; none where nvidia-smi tells none."""
    return _uuids(os.environ.get("CUDA_VISIBLE_DEVICES"))


@functools.cache
def _uuids(visible: str | None) -> tuple[str, ...]:
    cards, found = _cards(), []
    cut = {number: uuid for number, uuid, _ in reversed(_mig_instances())}  # CUDA takes the first instance of a card
    for wanted in visible.split(",") if visible is not None else map(str, range(len(cards))):
        name = wanted.strip()
        place = next((i for i, card in enumerate(cards) if str(i) == name or (len(name) > 4 and card.uuid.startswith(name))), None)
        if place is None and not name.startswith("MIG-"):
            break  # CUDA shows none of those behind an unknown name either
        found.append(name if place is None else cut.get(place, cards[place].uuid))
    return tuple(found)


def _cards() -> list[_Card]:
    """All GPUs by PCI bus; old drivers do not report the capability."""
    for wanted in ("uuid,compute_cap,memory.total,name", "uuid,memory.total,name"):
        try:
            found = []
            for line in _output_lines("nvidia-smi", f"--query-gpu={wanted}", "--format=csv,noheader,nounits"):
                uuid, *capability, mebibytes, name = (part.strip() for part in line.split(",", wanted.count(",")))
                found.append(_Card(uuid, float(capability[0]) if capability else None, int(mebibytes) * 2**20, name))
            if found:
                return found
        except ValueError:
            continue
    return []


_MIG = re.compile(r"\s+MIG\s+\S*?(\d+)gb\S*\s.*UUID:\s*(MIG-[^)\s]+)")


def _mig_instances() -> list[tuple[int, str, int]]:
    """(number of the GPU, UUID, bytes) of every MIG instance; none on most machines."""
    found, card = [], -1
    for line in _output_lines("nvidia-smi", "-L"):
        card += line.startswith("GPU ")
        if instance := _MIG.match(line):
            found.append((card, instance[2], int(instance[1]) * 2**30))
    return found


def _output_lines(*command: str) -> list[str]:
    """The lines of what a command prints; none where it fails or is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.rstrip().splitlines()
    except (OSError, subprocess.SubprocessError):
        return []


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
