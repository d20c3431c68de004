"""The GPUs of this machine and which of them processes started here use. No torch: where the driver's own tool is missing, a child
with torch is asked.

NVIDIA's cards are told by nvidia-smi. Where there is none, as with AMD's (torch for ROCm names them `cuda` too), torch tells them. Of
the two, CUDA takes UUIDs in CUDA_VISIBLE_DEVICES, and ROCm's HIP takes numbers alone (HIP_VISIBLE_DEVICES; it reads
CUDA_VISIBLE_DEVICES where that is not set).
Source: https://rocm.docs.amd.com/en/latest/conceptual/gpu-isolation.html.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from app.settings import get_settings

CUDA_ORDER = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
"""The environment of every process that uses a GPU, whatever ours says: GPUs are numbered as nvidia-smi numbers them, from which estimates
take the memory. By default CUDA begins with the fastest, in an order that nothing but CUDA knows."""


DEVICE_FILES = ("/dev/kfd", "/dev/nvidiactl", "/dev/dxg")
"""AMD's, NVIDIA's and WSL's: without any of them there is no GPU, and torch is not asked."""


class GpuCard(NamedTuple):
    """A GPU. `capability` is NVIDIA's; None for others, and where an old driver does not report it. `hip`: it computes by ROCm."""

    uuid: str
    capability: float | None
    memory_bytes: int
    name: str
    hip: bool = False


def first() -> tuple[str | None, int | None, float | None]:
    """Name, memory in bytes and compute capability of the GPU that a process started here uses: the first of CUDA_VISIBLE_DEVICES, or
    of all, numbered by PCI bus (`CUDA_ORDER`). Of a GPU with MIG, the memory of the instance."""
    cards = all_cards()
    visible = _visible()
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
    """UUIDs of the GPUs that processes started here use, in their order, or of the MIG instances; none where none are told."""
    return _uuids(_visible())


def visible_cards() -> list[GpuCard]:
    """The GPUs that processes started here use, each with the memory that they may take of it: that of its MIG instance, and at most
    `gpu_memory_bytes`."""
    most = get_settings().gpu_memory_bytes or sys.maxsize
    return [card._replace(memory_bytes=min(card.memory_bytes, most)) for card in _cards(visible_gpus(), tuple(all_cards()))]


@functools.cache
def _cards(uuids: tuple[str, ...], cards: tuple[GpuCard, ...]) -> list[GpuCard]:
    """The cards or MIG instances of these UUIDs; a part of a card is named by its own."""
    places = {card.uuid: card for card in cards}
    parts = {uuid: cards[number]._replace(memory_bytes=memory) for number, uuid, memory in _mig_instances() if number < len(cards)}
    found = []
    for uuid in uuids:
        part = next((card for name, card in parts.items() if name.startswith(uuid)), None)
        if (card := part or places.get(uuid)) is not None:
            found.append(card._replace(uuid=uuid))
    return found


def selection(uuids: Sequence[str]) -> dict[str, str]:
    """The environment of a process that is to use these GPUs and no others."""
    places = {card.uuid: str(place) for place, card in enumerate(all_cards()) if card.hip}
    if places:
        return {"HIP_VISIBLE_DEVICES": ",".join(places[uuid] for uuid in uuids)}
    return {"CUDA_VISIBLE_DEVICES": ",".join(uuids)}


NONE_VISIBLE = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
"""The environment of a process that is to use no GPU."""


def _visible() -> str | None:
    """The numbers or names of the GPUs that this process may use; None is all of them."""
    own = os.environ.get("HIP_VISIBLE_DEVICES") if any(card.hip for card in all_cards()) else None
    return os.environ.get("CUDA_VISIBLE_DEVICES") if own is None else own


@functools.cache
def _uuids(visible: str | None) -> tuple[str, ...]:
    cards, found = all_cards(), []
    cut = {number: uuid for number, uuid, _ in reversed(_mig_instances())}  # CUDA takes the first instance of a card
    for wanted in visible.split(",") if visible is not None else map(str, range(len(cards))):
        name = wanted.strip()
        place = next((i for i, card in enumerate(cards) if str(i) == name or (len(name) > 4 and card.uuid.startswith(name))), None)
        if place is None and not name.startswith("MIG-"):
            break  # CUDA shows none of those behind an unknown name either
        found.append(name if place is None else cut.get(place, cards[place].uuid))
    return tuple(found)


@functools.cache
def all_cards() -> list[GpuCard]:
    """All GPUs of this machine by PCI bus, whatever this process may use."""
    return _told_by_the_driver() or _told_by_torch()


def _told_by_the_driver() -> list[GpuCard]:
    """Old drivers do not report the capability."""
    for wanted in ("uuid,compute_cap,memory.total,name", "uuid,memory.total,name"):
        try:
            found = []
            for line in _output_lines("nvidia-smi", f"--query-gpu={wanted}", "--format=csv,noheader,nounits"):
                uuid, *capability, mebibytes, name = (part.strip() for part in line.split(",", wanted.count(",")))
                found.append(GpuCard(uuid, float(capability[0]) if capability else None, int(mebibytes) * 2**20, name))
            if found:
                return found
        except ValueError:
            continue
    return []


def _told_by_torch() -> list[GpuCard]:
    if not any(Path(file).exists() for file in DEVICE_FILES):
        return []
    environment = {name: value for name, value in os.environ.items() if name not in NONE_VISIBLE} | CUDA_ORDER
    lines = _output_lines(sys.executable, "-m", "worker.runtime.list_gpus", environment=environment, seconds=120)
    return [GpuCard(**card) for card in json.loads(lines[-1])] if lines else []


_MIG = re.compile(r"\s+MIG\s+\S*?(\d+)gb\S*\s.*UUID:\s*(MIG-[^)\s]+)")


def _mig_instances() -> list[tuple[int, str, int]]:
    """(number of the GPU, UUID, bytes) of every MIG instance; none on most machines."""
    found, card = [], -1
    for line in _output_lines("nvidia-smi", "-L"):
        card += line.startswith("GPU ")
        if instance := _MIG.match(line):
            found.append((card, instance[2], int(instance[1]) * 2**30))
    return found


def _output_lines(*command: str, environment: dict[str, str] | None = None, seconds: float = 10) -> list[str]:
    """The lines of what a command prints; none where it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=True, env=environment)
        return done.stdout.rstrip().splitlines()
    except (OSError, subprocess.SubprocessError):
        return []
