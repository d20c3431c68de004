"""Which GPU a machine is said to have: the one that a process started here will compute on, as the driver's own tool shows it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.machines import gpus
from app.ops import doctor
from worker.supervision import exit_codes

CARDS = """GPU-aaaa1111-0000, 8.6, 12288, NVIDIA GeForce RTX 3060
GPU-bbbb2222-0000, 8.9, 24564, NVIDIA GeForce RTX 4090"""
LISTED = """GPU 0: NVIDIA GeForce RTX 3060 (UUID: GPU-aaaa1111-0000)
GPU 1: NVIDIA GeForce RTX 4090 (UUID: GPU-bbbb2222-0000)"""
CUT_CARDS = "GPU-cccc3333-0000, 8.0, 81920, NVIDIA A100-SXM4-80GB"
CUT = """GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-cccc3333-0000)
  MIG 3g.40gb     Device  0: (UUID: MIG-1111-aaaa)
  MIG 1g.10gb     Device  1: (UUID: MIG-2222-bbbb)"""
GIB = 2**30


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """nvidia-smi of a machine with those cards."""

    def has(cards: str, listed: str, visible: str | None) -> tuple[str | None, int | None, float | None]:
        (tmp_path / "cards").write_text(cards + "\n")
        (tmp_path / "listed").write_text(listed + "\n")
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f'#!/bin/sh\n[ "$1" = -L ] && exec cat {tmp_path}/listed\nexec cat {tmp_path}/cards\n')
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        gpus.all_cards.cache_clear()
        gpus._uuids.cache_clear()
        return gpus.first()

    return has


@pytest.mark.parametrize(
    ("visible", "name", "mebibytes"),
    [
        (None, "NVIDIA GeForce RTX 3060", 12288),
        ("0", "NVIDIA GeForce RTX 3060", 12288),
        ("1", "NVIDIA GeForce RTX 4090", 24564),
        ("1,0", "NVIDIA GeForce RTX 4090", 24564),
        ("GPU-bbbb2222", "NVIDIA GeForce RTX 4090", 24564),
        ("", None, None),
        ("7", None, None),
        ("GPU-dddd", None, None),
    ],
)
def test_memory_is_that_of_the_card_that_computes(driver, visible: str | None, name: str | None, mebibytes: int | None) -> None:
    found, memory, _ = driver(CARDS, LISTED, visible)
    assert (found, memory) == (name, mebibytes and mebibytes * 2**20)


@pytest.mark.parametrize(("visible", "gigabytes"), [(None, 40), ("0", 40), ("MIG-2222-bbbb", 10), ("MIG-9999", None)])
def test_a_part_of_a_card_has_a_part_of_its_memory(driver, visible: str | None, gigabytes: int | None) -> None:
    found, memory, capability = driver(CUT_CARDS, CUT, visible)
    assert memory == (gigabytes and gigabytes * GIB) and (capability == 8.0) == (found is not None) == (gigabytes is not None)


def test_an_old_driver_tells_no_capability(driver) -> None:
    assert driver("GPU-eeee, 15360, Tesla T4", "GPU 0: Tesla T4 (UUID: GPU-eeee)", None) == ("Tesla T4", 15360 * 2**20, None)


TORCH = """
import os, sys

sys.path[:] = [folder for folder in sys.path if os.path.abspath(folder or ".") != os.path.dirname(os.path.abspath(__file__))]
del sys.modules["torch"]
import torch

class Properties:
    name, total_memory, major, minor, pci_domain_id, pci_device_id = "{name}", 192 * 2**30, 9, 4, 0, 0
    def __init__(self, place):
        self.pci_bus_id = 0xc1 + place
        if not torch.version.hip:
            self.uuid = f"{{place}}ab-cd"

def count():
    return 0 if os.environ.get("HIP_VISIBLE_DEVICES") == "" or os.environ.get("CUDA_VISIBLE_DEVICES") == "" else 2

torch.version.hip = {hip}
torch.cuda.device_count, torch.cuda.is_available, torch.cuda.get_device_properties = count, lambda: count() > 0, Properties
"""
"""What a build of torch for another kind of card says of two of them."""


@pytest.fixture
def torch_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A machine without nvidia-smi, whose torch knows two cards."""

    def told(hip: str | None, name: str, **visible: str) -> tuple[str | None, int | None, float | None]:
        (tmp_path / "torch.py").write_text(TORCH.format(hip=repr(hip), name=name))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
        monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
        monkeypatch.setattr(gpus, "DEVICE_FILES", (str(tmp_path / "torch.py"),))
        for variable in gpus.NONE_VISIBLE:
            monkeypatch.delenv(variable, raising=False)
        for variable, value in visible.items():
            monkeypatch.setenv(variable, value)
        gpus.all_cards.cache_clear()
        gpus._uuids.cache_clear()
        return gpus.first()

    yield told
    gpus.all_cards.cache_clear()
    gpus._uuids.cache_clear()


def test_without_the_drivers_tool_torch_tells_amds_cards(torch_tells) -> None:
    assert torch_tells("7.1", "AMD Instinct MI300X") == ("AMD Instinct MI300X", 192 * GIB, None)
    assert gpus.visible_gpus() == ("PCI-00:c1:00", "PCI-00:c2:00")
    assert gpus.selection(gpus.visible_gpus()[1:]) == {"HIP_VISIBLE_DEVICES": "1"}, "HIP takes numbers, and no names"
    assert "MI300X, 192 GiB" in doctor.gpu().found and doctor.gpu().verdict == "good"


@pytest.mark.parametrize(
    ("visible", "seen"),
    [
        ({"HIP_VISIBLE_DEVICES": "1"}, 1),
        ({"CUDA_VISIBLE_DEVICES": "1"}, 1),
        ({"HIP_VISIBLE_DEVICES": ""}, 0),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0),
    ],
)
def test_amds_cards_are_chosen_by_either_variable(torch_tells, visible: dict[str, str], seen: int) -> None:
    torch_tells("7.1", "AMD Instinct MI300X", **visible)
    assert gpus.visible_gpus() == ("PCI-00:c2:00",) * seen
    assert (gpus.first()[0] is not None) == bool(seen)


def test_torch_tells_nvidias_cards_by_their_own_names(torch_tells) -> None:
    assert torch_tells(None, "NVIDIA H100")[2] == 9.4
    assert gpus.selection(gpus.visible_gpus()) == {"CUDA_VISIBLE_DEVICES": "GPU-0ab-cd,GPU-1ab-cd"}


def test_a_machine_without_a_device_file_does_not_ask_torch(torch_tells, monkeypatch) -> None:
    torch_tells("7.1", "AMD Instinct MI300X")
    monkeypatch.setattr(gpus, "DEVICE_FILES", ("/dev/no-such-card",))
    gpus.all_cards.cache_clear()
    assert gpus.all_cards() == [] and gpus.first() == (None, None, None)


def test_a_trainer_gets_what_chooses_amds_cards_and_makes_them_work(data_dir) -> None:
    ours = {"HIP_VISIBLE_DEVICES": "1", "ROCR_VISIBLE_DEVICES": "GPU-1", "HSA_OVERRIDE_GFX_VERSION": "11.0.0", "HF_TOKEN": "secret"}
    kept = exit_codes.trainer_environment(ours)
    assert {name: kept.get(name) for name in ours} == ours | {"HF_TOKEN": None}
    assert exit_codes.trainer_environment(ours, device="cpu").items() >= gpus.NONE_VISIBLE.items()


def test_a_trainer_counts_the_cards_as_the_driver_does(data_dir) -> None:
    """CUDA begins with the fastest by itself, and an estimate would be about another card; nothing but CUDA knows that order."""
    for ours in ({}, {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}):
        assert exit_codes.trainer_environment(ours)["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


def test_a_worker_counts_the_cards_as_its_trainers_do() -> None:
    """The playground computes in the worker's own process, and makes room for jobs on the card that it takes for its own."""
    program = "import os, worker.main; print(os.environ['CUDA_DEVICE_ORDER'])"
    environment = {**os.environ, "CUDA_DEVICE_ORDER": "FASTEST_FIRST"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["PCI_BUS_ID"]


def test_the_doctor_says_that_another_order_is_not_used(driver, monkeypatch) -> None:
    driver("0, NVIDIA GeForce RTX 4090, 24564 MiB, 23000 MiB, 570.1\n1, Tesla T4, 15360 MiB, 15000 MiB, 570.1", LISTED, None)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    assert doctor.gpu().verdict == "good"
    assert doctor.gpu().found.startswith(
        "0: NVIDIA GeForce RTX 4090, 23000 MiB of 24564 MiB free, driver 570.1; 1: Tesla T4, 15000 MiB of "
    )
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    assert doctor.gpu().verdict == "note" and "CUDA_DEVICE_ORDER" in doctor.gpu().hint


def test_what_is_compiled_for_a_gpu_is_kept_in_the_data_folder(data_dir, tmp_path) -> None:
    environment = exit_codes.trainer_environment({}, tmp_path / "a1")
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH"):
        assert Path(environment[name]).is_relative_to(data_dir / "cache"), name
