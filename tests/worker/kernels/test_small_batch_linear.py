"""Linear layers of an answering model: the same products whichever library makes them, joined without more memory."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from worker.inference.model_pool import share_weights
from worker.inference.sampling import one_thread
from worker.kernels.cpu import small_batch_linear
from worker.kernels.cpu.small_batch_linear import FEW, SmallBatchLinear, patch_small_batch

WIDTHS = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}
FAMILIES = {"no biases": (LlamaForCausalLM, LlamaConfig), "biases": (Qwen2ForCausalLM, Qwen2Config)}


@pytest.fixture(autouse=True)
def pays(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch has no oneDNN here.")
    monkeypatch.setattr(small_batch_linear, "pays_here", lambda: True)


def built(family: str) -> torch.nn.Module:
    kind, config = FAMILIES[family]
    torch.manual_seed(0)
    model = kind(config(**WIDTHS)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.normal_()
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("join", [False, True])
def test_any_number_of_rows_gives_what_the_layers_gave(family: str, join: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = built(family), []
    rows = [1, 2, FEW[0] - 1, FEW[0], 11, FEW[-1], FEW[-1] + 1]
    inputs = [torch.randint(0, 300, (1, count), generator=torch.Generator().manual_seed(count)) for count in rows]
    with torch.inference_mode():
        expected = [model(input_ids=x, use_cache=False).logits for x in inputs]
        before = sum(p.untyped_storage().nbytes() for p in {p.data_ptr(): p for p in model.parameters()}.values())
        source = share_weights(model)
        assert patch_small_batch(model, join) == 2 * 7 + 1
        original = small_batch_linear._onednn
        monkeypatch.setattr(small_batch_linear, "_onednn", lambda x, *rest: asked.append(x.shape[0]) or original(x, *rest))
        for x, logits in zip(inputs, expected, strict=True):
            assert torch.allclose(model(input_ids=x, use_cache=False).logits, logits, atol=1e-5)
            assert torch.allclose(source(input_ids=x, use_cache=False).logits, logits, atol=1e-5)
    assert set(asked) == {FEW[0], 11, FEW[-1]} and len(asked) == 3 * ((2 * 4 if join else 2 * 7) + 1)
    assert not any(isinstance(m, SmallBatchLinear) for m in source.modules())
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(storages.values()) == before, "joined weights are views of one another's matrix"
    for ours, theirs in zip(model.parameters(), source.parameters(), strict=True):
        assert ours.data_ptr() == theirs.data_ptr()


def test_other_types_and_other_layers_are_left_alone() -> None:
    assert patch_small_batch(built("no biases").to(torch.bfloat16), join=True) == 0
    layer = SmallBatchLinear(8, 4)
    x = torch.randn(5, 8, requires_grad=True)
    layer(x).sum().backward()  # with gradients: torch's own product
    assert x.grad is not None and layer.weight.grad is not None


def test_it_is_measured_whether_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    small_batch_linear.pays_here.cache_clear()
    clock = iter(range(10**6))
    monkeypatch.setattr(small_batch_linear.time, "perf_counter", lambda: float(next(clock)))  # every try takes as long as every other
    assert small_batch_linear.pays_here() is False
    monkeypatch.setattr(small_batch_linear, "_onednn", lambda *_: None)
    ticks = iter([0.0, 2.0, 2.0, 3.0] * 12)
    monkeypatch.setattr(small_batch_linear.time, "perf_counter", lambda: next(ticks))
    small_batch_linear.pays_here.cache_clear()
    assert small_batch_linear.pays_here() is True
    small_batch_linear.pays_here.cache_clear()


def test_a_choice_is_made_by_one_thread() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(ArithmeticError), one_thread(torch.device("cpu")):
            assert torch.get_num_threads() == 1
            raise ArithmeticError
        assert torch.get_num_threads() == 2
        with one_thread(torch.device("cuda")):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
