"""What a machine with GPUs is told and asked, as far as it shows without one."""

from __future__ import annotations

import logging

import pytest
import torch

from app.errors import DoesNotFit
from app.evaluation.service import EvaluationSpec
from app.machines import gpus, hardware
from app.machines.hardware import Machine, Pace, this_machine
from app.ops.embedded import up
from app.settings import get_settings
from app.spec import DatasetRef, ModelRef, RunSettings
from app.strategies import STRATEGIES
from tests.worker.orders import chat_rows, order, put_dataset, put_model
from worker.modeling import cross_entropy, loading, packed_attention
from worker.runtime import device
from worker.supervision import confinement, exit_codes
from worker.train import train

RUN, LORA = RunSettings(), STRATEGIES["lora"]()


@pytest.fixture
def with_a_card(data_dir, monkeypatch):
    """A machine whose driver shows a card."""
    monkeypatch.setattr(device, "this_machine", lambda: this_machine().model_copy(update={"gpu_memory_bytes": 80 * 2**30}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees the card here")
def test_a_card_that_torch_cannot_use_is_not_passed_over(with_a_card, monkeypatch):
    """A driver older than torch's CUDA: days on the processor would pass before anyone wondered."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(DoesNotFit, match="torch cannot use it") as caught:
        device.choose(RUN, LORA)
    assert "luthier doctor" in caught.value.hint and "CUDA_VISIBLE_DEVICES" in caught.value.hint
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device.choose(RUN, LORA).device.type == "cpu"


def test_a_run_may_leave_the_card_to_others(with_a_card, monkeypatch):
    """Neither the engine, nor its memory, nor its pace, nor the trainer's environment and room know of the card."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    engine = device.choose(RunSettings(device="cpu"), LORA)
    assert engine.device.type == "cpu" and engine.facts()["device"].startswith("cpu (")
    here = device.memory_here(engine.device)
    assert not here.cuda and here.training_memory_bytes == this_machine().memory_bytes
    card = device.this_machine()
    for module in (exit_codes, confinement):
        monkeypatch.setattr(module, "this_machine", lambda: card)
    seen = {name: exit_codes.trainer_environment({"CUDA_VISIBLE_DEVICES": "1"}, None, name) for name in ("auto", "cpu", "cuda")}
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in seen.values()] == ["1", "", "1"]
    assert ["PYTORCH_ALLOC_CONF" in environment for environment in seen.values()] == [True, False, True]
    spec = EvaluationSpec.model_construct(
        model=ModelRef.model_construct(path="", adapters=()), base=None, dataset=DatasetRef.model_construct(path="")
    )
    rooms = [confinement.room_of(spec, get_settings().data_dir / "runs" / "a", environment) for environment in seen.values()]
    assert [room.gpu for room in rooms] == [True, False, True] and rooms[1].memory_bytes


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees the card here")
def test_a_job_trains_on_the_processor_beside_a_card(with_a_card, tiny_model, monkeypatch):
    """One that torch could not use: a run that does not want it is not kept from training, and says what it trained on."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    model, data, runs = put_model(tiny_model), put_dataset(chat_rows()), get_settings().data_dir / "runs"
    with pytest.raises(DoesNotFit, match="torch cannot use it"):
        list(train(order(model, data, max_steps=2), runs / "auto" / "a1"))
    said = list(train(order(model, data, max_steps=2, device="cpu"), runs / "cpu" / "a1"))
    started = next(one for one in said if one.type == "started")
    assert started.device.startswith("cpu (") and started.details["device"] == started.device
    assert said[-1].type == "finished" and said[-1].measured.device == started.device


def test_what_a_card_measured_is_not_said_of_the_processor(data_dir, monkeypatch):
    card = Machine(cores=2, memory_bytes=2**34, processor="a processor", gpu_name="a card", gpu_memory_bytes=2**36, bf16_pays=True)
    monkeypatch.setattr(hardware, "this_machine", lambda: card)
    hardware.calibrate("lora", pace := Pace(operations_per_second=1e9, fixed_seconds=2.0), "cpu")
    hardware.calibrate("lora", Pace(operations_per_second=1e13, fixed_seconds=1.0), "cuda")
    known = card.model_copy(update={"paces": hardware.read_calibration()})
    assert set(known.paces) == {"2 cores of a processor · lora", "a card · lora"} and known.on("cpu").pace("lora") == (pace, True)
    assert known.on("auto") is known and known.on("cuda") is known and not known.on("cpu").bf16_pays
    assert card.model_copy(update={"bf16_measured": 1.5}).on("cpu").bf16_pays


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a card here")
def test_a_card_that_was_asked_for_is_not_done_without(data_dir):
    with pytest.raises(DoesNotFit, match="The device cuda needs an NVIDIA GPU") as caught:
        device.choose(RunSettings(device="cuda"), LORA)
    assert caught.value.param == "device" and "auto or cpu" in caught.value.hint


def test_a_kernel_that_cannot_be_built_is_done_without(caplog):
    """Here Triton is missing; on a GPU's machine it may be a C compiler, which Triton asks for at its first use."""
    cross_entropy.kernel_works.cache_clear()
    with caplog.at_level(logging.WARNING):
        works = cross_entropy.kernel_works(torch.device("cpu"))
        again = cross_entropy.kernel_works(torch.device("cpu"))
    cross_entropy.kernel_works.cache_clear()
    assert works is again is False
    assert len(caplog.records) == 1 and "plain torch" in caplog.text


@pytest.fixture
def four_cards(monkeypatch):
    monkeypatch.setattr(gpus, "all_cards", lambda: [gpus.GpuCard(f"GPU-{place}", 9.0, 80 * 2**30, "H100") for place in "abcd"])
    gpus._uuids.cache_clear()
    yield
    gpus._uuids.cache_clear()


def test_a_studio_trains_on_all_cards_by_default(data_dir, monkeypatch, four_cards):
    """A worker for each, or for as many as a job takes; seven of eight idled. Each sees all of them, and leases what a job needs."""
    settings = get_settings()
    for visible, each, workers in (("0,1,2,3", 1, 4), ("0,1,2,3", 2, 2), (None, 1, 4), ("0", 1, 1), ("", 1, 1)):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        one = settings.model_copy(update={"gpus_per_job": each})
        assert up.train_workers(one) == workers
        assert up.train_worker(["train@%h"], 1, one).env == {}
    assert up.train_workers(settings.model_copy(update={"train_workers": 0})) == 0


def test_answers_do_not_wait_for_plans_of_an_attention():
    assert loading.packed.NAME and not torch.backends.cuda.cudnn_sdp_enabled()


def test_values_of_a_joint_product_do_not_keep_queries_and_keys(monkeypatch):
    """On a GPU the attention keeps what it is given until the backward pass."""
    given = []
    monkeypatch.setattr(packed_attention, "_repeats", False)
    monkeypatch.setattr(packed_attention, "varlen_attn", lambda q, k, v, *rest, **more: given.append((q, k, v)) or q)
    joint = torch.randn(1, 6, 32, dtype=torch.bfloat16)
    query, key, value = (part.view(1, 6, -1, 8).transpose(1, 2) for part in joint.split([16, 8, 8], -1))
    ends = torch.tensor([0, 4, 6], dtype=torch.int32)
    packed_attention.packed_attention(torch.nn.Module(), query.clone(), key.clone(), value, None, cu_seq_lens=ends, longest=4)
    (kept,) = given
    assert torch.equal(kept[2], value[0].transpose(0, 1)) and kept[2].untyped_storage().nbytes() == value.numel() * 2
