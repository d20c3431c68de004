"""What a machine with GPUs is told and asked, as far as it shows without one."""

from __future__ import annotations

import logging

import pytest
import torch

from app.errors import DoesNotFit
from app.machines.hardware import this_machine
from app.ops.embedded import up
from app.settings import get_settings
from app.spec import RunSettings
from app.strategies import STRATEGIES
from worker.modeling import cross_entropy, loading, packed_attention
from worker.runtime import device

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
    assert "luthier doctor" in caught.value.way_out and "CUDA_VISIBLE_DEVICES" in caught.value.way_out
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device.choose(RUN, LORA).device.type == "cpu"


def test_a_kernel_that_cannot_be_built_is_done_without(caplog):
    """Here Triton is missing; on a GPU's machine it may be a C compiler, which Triton asks for at its first use."""
    cross_entropy.kernel_works.cache_clear()
    with caplog.at_level(logging.WARNING):
        works = cross_entropy.kernel_works(torch.device("cpu"))
        again = cross_entropy.kernel_works(torch.device("cpu"))
    cross_entropy.kernel_works.cache_clear()
    assert works is again is False
    assert len(caplog.records) == 1 and "plain torch" in caplog.text


def test_each_worker_gets_as_many_cards_as_a_job_takes(data_dir, monkeypatch):
    settings = get_settings().model_copy(update={"train_workers": 2, "gpus_per_job": 2})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    seen = [up.train_worker(["train@%h"], number, settings).env["CUDA_VISIBLE_DEVICES"] for number in (1, 2)]
    assert seen == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")  # too few to share out: both see all
    assert "CUDA_VISIBLE_DEVICES" not in up.train_worker(["train@%h"], 1, settings).env


def test_answers_do_not_wait_for_plans_of_an_attention():
    assert loading.packed.NAME and not torch.backends.cuda.cudnn_sdp_enabled()


def test_values_of_a_joint_product_do_not_keep_queries_and_keys(monkeypatch):
    """On a GPU the attention keeps what it is given until the backward pass."""
    given = []
    monkeypatch.setattr(packed_attention, "varlen_attn", lambda q, k, v, *rest, **more: given.append((q, k, v)) or q)
    joint = torch.randn(1, 6, 32, dtype=torch.bfloat16)
    query, key, value = (part.view(1, 6, -1, 8).transpose(1, 2) for part in joint.split([16, 8, 8], -1))
    ends = torch.tensor([0, 4, 6], dtype=torch.int32)
    packed_attention.packed_attention(torch.nn.Module(), query.clone(), key.clone(), value, None, cu_seq_lens=ends, longest=4)
    (kept,) = given
    assert torch.equal(kept[2], value[0].transpose(0, 1)) and kept[2].untyped_storage().nbytes() == value.numel() * 2
