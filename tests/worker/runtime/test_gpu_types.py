"""Which number formats a GPU would see, found without one: fake tensors on a CUDA device go through torch's own rules for autocast."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
from packaging.version import Version
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from worker.modeling import fused_layers, packed_attention

WIDTHS = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "vocab_size": 128, "max_position_embeddings": 256,
}  # fmt: skip


@pytest.fixture
def autocast() -> Iterator[None]:
    """CUDA's autocast to bf16, which `torch.autocast` itself refuses to switch on where there is no GPU."""
    kept = torch.get_autocast_dtype("cuda")
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    yield
    torch.set_autocast_enabled("cuda", False)
    torch.set_autocast_dtype("cuda", kept)


class Seen:
    """What the attention was called with, and what the blocks gave each other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, family: str, weights: torch.dtype, rounded: bool) -> None:
        self.attention: list[tuple[torch.dtype, ...]] = []
        self.stream: list[torch.dtype] = []
        self.norms: set[torch.dtype] = set()
        monkeypatch.setattr(packed_attention, "varlen_attn", self._spy(packed_attention.varlen_attn))
        with FakeTensorMode(), torch.no_grad():
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **WIDTHS), attn_implementation=packed_attention.NAME)
            _move(model, weights)
            # How positions are turned asks for a real device; the types are what they are there: the tables have that of the
            # embedding's output, and queries and keys are multiplied with them.
            model.model.rotary_emb.forward = lambda x, position_ids: (x.new_empty(1, 64, 16), x.new_empty(1, 64, 16))
            family_of = sys.modules[type(model).__module__]
            monkeypatch.setattr(family_of, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q * cos.unsqueeze(1), k * sin.unsqueeze(1)))
            assert fused_layers.patch_norms(model) == (9 if family == "qwen3" else 5)
            if rounded:
                assert fused_layers.round_embeddings(model, torch.bfloat16) == (weights == torch.float32)
            for block in fused_layers.blocks_of(model):
                block.register_forward_hook(lambda block, given, out: self.stream.append(out.dtype))
                for name in ("input_layernorm", "post_attention_layernorm"):
                    getattr(block, name).register_forward_hook(lambda norm, given, out: self.norms.add(out.dtype))
            ends = torch.zeros(5, dtype=torch.int32, device="cuda")
            places = torch.zeros(1, 64, dtype=torch.int64, device="cuda")
            model.get_decoder()(input_ids=places, position_ids=places, use_cache=False, cu_seq_lens=ends, longest=64)

    def _spy(self, real):
        def called(q, k, v, *rest, **named):
            self.attention.append((q.dtype, k.dtype, v.dtype))
            return real(q, k, v, *rest, **named)

        return called


def _move(model: torch.nn.Module, weights: torch.dtype) -> None:
    """Every tensor anew: one cannot be copied to a device that torch was built without."""
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(torch.empty(p.shape, device="cuda", dtype=weights), requires_grad=False))
        for name, b in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(b.shape, device="cuda", dtype=b.dtype))


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_every_layer_reaches_the_fast_attention_in_bf16(monkeypatch, autocast, family: str, weights: torch.dtype) -> None:
    """With frozen weights in bf16, and with trained ones in float32, whose embedding makes queries and keys float32."""
    half = torch.bfloat16
    seen = Seen(monkeypatch, family, weights, rounded=True)
    assert seen.attention == [(half, half, half)] * 2
    assert seen.stream == [half] * 2 and seen.norms == {half}


def test_queries_are_rounded_even_where_the_stream_is_not(monkeypatch, autocast) -> None:
    seen = Seen(monkeypatch, "llama", torch.float32, rounded=False)
    assert seen.attention == [(torch.bfloat16,) * 3] * 2
    assert seen.stream == [torch.float32] * 2


@pytest.mark.skipif(Version(torch.__version__) < Version("2.13"), reason="torch before 2.13 has no such rule")
def test_autocast_would_compute_norms_in_float32(autocast) -> None:
    """The rule that the fused norms step around; were it gone, so could they."""
    with FakeTensorMode():
        x = torch.empty(2, 8, device="cuda", dtype=torch.bfloat16)
        assert torch.nn.functional.rms_norm(x, (8,)).dtype == torch.float32


def test_an_encoders_dropout_does_not_forbid_the_fast_attention(monkeypatch) -> None:
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(packed_attention, "varlen_attn", lambda q, *rest, window_size, **named: calls.append(window_size) or q)
    q = torch.zeros(1, 4, 6, 8, dtype=torch.bfloat16)
    encoder = torch.nn.Module()
    encoder.is_causal = False
    ends = torch.tensor([0, 2, 6], dtype=torch.int32)
    for window in (None, 4):
        packed_attention.packed_attention(encoder, q, q, q, None, dropout=0.1, sliding_window=window, cu_seq_lens=ends, longest=4)
    assert calls == [(-1, -1), (3, 3)]  # a window looks both ways


@pytest.mark.long
def test_what_works_is_told_from_what_does_not() -> None:
    """The doctor's own trials, on the processor: products work there, the GPU's attention does not."""
    from worker import selftest

    found = selftest.examine("cpu")
    assert found["torch"]["works"] and torch.__version__ in found["torch"]["said"]
    assert not found["attention"]["works"] and found["attention"]["said"]
    assert found["nccl"] == {"works": True, "said": "two processes add up through gloo"}
    assert found["compiler"]["works"], found["compiler"]["said"]
    assert found["compiler"]["said"].startswith("a layer forwards and backwards")


def test_the_allocator_of_a_gpu_is_told_to_let_blocks_grow(data_dir, monkeypatch) -> None:
    """Only where there is a GPU, and not against what a person has set."""
    from app.machines.hardware import Machine
    from worker.supervision import exit_codes

    card = Machine(cores=1, memory_bytes=1, gpu_memory_bytes=2**34)
    assert "PYTORCH_ALLOC_CONF" not in exit_codes.trainer_environment({})
    monkeypatch.setattr(exit_codes, "this_machine", lambda: card)
    assert exit_codes.trainer_environment({})["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert exit_codes.trainer_environment({"PYTORCH_ALLOC_CONF": "backend:native"})["PYTORCH_ALLOC_CONF"] == "backend:native"
    own = exit_codes.trainer_environment({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"})
    assert own["PYTORCH_CUDA_ALLOC_CONF"] == "max_split_size_mb:64" and "PYTORCH_ALLOC_CONF" not in own


def test_memory_is_what_is_free_on_the_card_and_held_already(data_dir, monkeypatch) -> None:
    from worker.runtime import device

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda where: (30 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda where: 16 * 2**30)
    assert device.memory_here(torch.device("cuda")).training_memory_bytes == 46 * 2**30
    monkeypatch.setenv("WORLD_SIZE", "2")  # they must choose alike
    assert device.memory_here(torch.device("cuda")).training_memory_bytes == 80 * 2**30
    assert device.memory_here(torch.device("cpu")).training_memory_bytes == device.this_machine().memory_bytes // 2
