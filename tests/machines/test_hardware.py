"""Which GPU a machine is said to have: the one that a process started here will compute on, as the driver's own tool shows it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from app.machines import hardware
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
        return hardware._gpu()

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
