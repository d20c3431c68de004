"""The kinds of devices: what torch has to have for one, and that another kind is nothing but a file."""

from __future__ import annotations

import inspect
import re
import time

import pytest
import torch

from app.kit.registry import classes_in
from app.run_settings import RunSettings
from app.strategies import STRATEGIES
from worker.runtime import device, devices
from worker.runtime.devices import _base
from worker.training import profiler

GIB = 2**30


class Xpu(devices.Gpu):
    """A kind as its file would hold it."""

    kind = "xpu"
    collectives = "xccl"
    activity = torch.profiler.ProfilerActivity.XPU


@pytest.fixture
def xpu(monkeypatch: pytest.MonkeyPatch) -> Xpu:
    """A machine with one such GPU, with 16 GiB of which 4 are taken by others."""
    made = Xpu()
    said = {
        "is_available": lambda: True, "is_bf16_supported": lambda including_emulation=True: not including_emulation,
        "set_device": lambda where: None, "get_device_name": lambda where: "A GPU of another kind",
        "mem_get_info": lambda where: (12 * GIB, 16 * GIB), "memory_reserved": lambda where: GIB,
    }  # fmt: skip
    for name, value in said.items():
        monkeypatch.setattr(torch.xpu, name, value)
    monkeypatch.setattr(devices, "DEVICES", {**devices.DEVICES, "xpu": made})
    monkeypatch.setattr(devices, "GPUS", (*devices.GPUS, "xpu"))
    return made


@pytest.mark.parametrize("module", [torch.cuda, torch.xpu], ids=["cuda", "xpu"])
def test_torch_has_what_the_defaults_ask_for(module) -> None:
    asked = set(re.findall(r"self\.module\.(\w+)", inspect.getsource(_base)))
    assert len(asked) >= 14 and not [name for name in asked if not hasattr(module, name)]
    assert "timing" in inspect.signature(_base.Gpu.event).parameters and "including_emulation" in str(
        inspect.signature(module.is_bf16_supported)
    )


def test_each_file_of_the_folder_is_a_kind() -> None:
    assert list(devices.DEVICES) == [kind.kind for kind in classes_in(devices.__name__, devices.Device)] == ["cpu", "cuda"]
    assert devices.GPUS == ("cuda",) and not devices.is_gpu(torch.device("cpu")) and devices.is_gpu(torch.device("cuda", 1))
    assert devices.gpu_of(torch.device("cpu")) is None and devices.gpu_of(torch.device("cuda")) is devices.DEVICES["cuda"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch takes the card of this machine")
def test_another_kind_is_taken_without_a_change_elsewhere(data_dir, xpu: Xpu) -> None:
    """Chosen, in bf16, with its own memory reckoned with, by the code that knows no kind."""
    assert devices.best() is devices.gpu() is xpu
    engine = device.choose(RunSettings(), STRATEGIES["lora"]())
    assert (engine.device, engine.name, engine.precision, engine.framed) == (torch.device("xpu", 0), "A GPU of another kind", "bf16", True)
    assert device.memory_here(engine.device).training_memory_bytes == 13 * GIB and device.gpu_memory(engine.device) == (12 * GIB, 16 * GIB)
    assert device.choose(RunSettings(device="cpu"), STRATEGIES["lora"]()).device.type == "cpu"
    with pytest.raises(NotImplementedError, match="xpu"):
        xpu.capture(lambda: torch.zeros(1))


def test_a_checkpoint_keeps_random_states_by_the_kind_of_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the names that checkpoints have had all along: `cpu`, and `cuda` on a GPU."""
    cuda, put = torch.device("cuda", 0), []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda where: torch.tensor([7], dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, where: put.append((state.tolist(), where)))
    kept = device.rng_tensors(cuda)
    assert set(kept) == {"cpu", "cuda"} and set(device.rng_tensors(torch.device("cpu"))) == {"cpu"}
    first = torch.rand(3)
    device.set_rng(kept, cuda)
    assert put == [([7], cuda)] and torch.equal(torch.rand(3), first)
    device.set_rng({"cpu": kept["cpu"]}, cuda)  # a job that went on from a CPU's checkpoint
    assert len(put) == 1 and torch.equal(torch.rand(3), first)


def test_a_profile_on_a_gpu_records_both(monkeypatch: pytest.MonkeyPatch, xpu: Xpu) -> None:
    asked = []

    class Recorder:
        def __init__(self, activities, **_) -> None:
            asked.extend(activities)

        def start(self) -> None: ...

    monkeypatch.setattr(torch.profiler, "profile", Recorder)
    monkeypatch.setattr(torch.xpu, "synchronize", lambda: None)
    profiler._start()
    assert asked == [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.XPU]


def test_the_cpu_times_and_waits_like_the_others() -> None:
    cpu = devices.CPU
    began = cpu.event(timing=True)
    time.sleep(0.02)
    end = cpu.event(timing=True)
    cpu.synchronize(), end.synchronize()
    assert 20 <= began.elapsed_time(end) < 2000
    assert cpu.peak_memory(torch.device("cpu")) > 50 * 2**20
