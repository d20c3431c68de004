"""A step's figures are read one step late on a GPU, behind the next step's work, and are the same figures."""

from __future__ import annotations

import pytest
import torch

from app import events
from tests.worker.orders import chat_rows, order, put_dataset, put_model
from worker import train
from worker.runtime import devices, transfer
from worker.runtime.transfer import AsyncScalars


def steps(told) -> list[events.Step]:
    return [e for e in told if isinstance(e, events.Step)]


def test_a_step_is_read_when_the_next_one_is_ordered(monkeypatch, data_dir, tiny_model) -> None:
    spec = order(put_model(tiny_model), put_dataset(chat_rows(24)), epochs=1, evaluations_per_epoch=1)
    at_once = steps(train.train(spec, data_dir / "runs" / "once" / "a1"))
    said: list[str] = []

    def noted(name, real):
        def called(*given, **named):
            said.append(name)
            return real(*given, **named)

        return called

    monkeypatch.setattr(train, "depth", lambda device: 1)
    for name in ("take_step", "next_batch", "report"):
        monkeypatch.setattr(train, name, noted(name, getattr(train, name)))
    later = steps(train.train(spec, data_dir / "runs" / "late" / "a1"))
    assert [(e.step, e.loss, e.grad_norm) for e in later] == [(e.step, e.loss, e.grad_norm) for e in at_once]
    count = len(at_once)
    assert count > 3
    middle = ["take_step", "next_batch", "report"] * (count - 1)
    assert said == ["next_batch", "take_step", "next_batch", *middle, "report"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What CUDA is asked for, in order."""
    asked: list[str] = []

    class Event:
        def record(self) -> None:
            asked.append("record")

        def synchronize(self) -> None:
            asked.append("synchronize")

    real = torch.empty

    def empty(shape, *, dtype, pin_memory=False):
        asked.append("pinned" if pin_memory else "pageable")
        return real(shape, dtype=dtype)

    monkeypatch.setattr(transfer.torch, "empty", empty)
    monkeypatch.setattr(transfer.torch.cuda, "Event", Event)
    monkeypatch.setattr(transfer.devices, "gpu_of", lambda device: devices.DEVICES["cuda"])  # where the tensors say that they lie
    return asked


def test_reading_waits_for_the_steps_own_event_alone(gpu: list[str]) -> None:
    loss, norm, more = torch.tensor(0.1), torch.tensor(3.7), torch.arange(4, dtype=torch.float64)
    figures = AsyncScalars([loss, norm, more])
    assert gpu == ["pinned", "record"]  # nothing was waited for
    assert figures.read().tolist() == [float(loss), float(norm), 0.0, 1.0, 2.0, 3.0]
    assert gpu == ["pinned", "record", "synchronize"]
