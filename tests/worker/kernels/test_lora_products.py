"""LoRA's small products by the processor's matrix units: what they give, what they leave alone, and when they are not taken."""

from __future__ import annotations

import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model

from worker.kernels.cpu import lora_products
from worker.modeling import fused_lora

needs_units = pytest.mark.skipif(not lora_products.is_available(), reason="the processor has no matrix units")


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs).norm() / theirs.norm())


@needs_units
@pytest.mark.parametrize(
    ("rows", "width", "rank"), [(512, 576, 16), (480, 1536, 48), (32, 64, 8), (96, 192, 24), (160, 96, 41), (64, 32, 1)]
)
def test_they_are_the_products_within_what_bf16_rounds(rows: int, width: int, rank: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(rows, 2 * width).bfloat16()[:, width:]  # part of a wider matrix, as a part of a joint gradient is
    down, up = torch.randn(rank, width).bfloat16(), torch.randn(width, rank).bfloat16()
    low = torch.randn(rows, rank + 5).bfloat16()[:, 2 : rank + 2]
    beside = torch.full((rows, rank + 7), 9.0, dtype=torch.bfloat16)
    back = beside[:, 3 : rank + 3]
    assert lora_products.supports(x)
    assert apart(lora_products.project(x, down), x.double() @ down.double().t()) < 2e-3
    assert apart(lora_products.both(x, up, low, back), x.double().t() @ low.double()) < 1e-6
    assert apart(back, x.double() @ up.double()) < 2e-3
    assert (beside[:, :3] == 9).all() and (beside[:, rank + 3 :] == 9).all()
    assert apart(lora_products.gather(x, low), low.double().t() @ x.double()) < 1e-6


@needs_units
def test_that_they_work_is_found_out_also_in_the_middle_of_a_pass() -> None:
    lora_products.is_available.cache_clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert lora_products.is_available()


@needs_units
def test_what_is_no_number_is_seen() -> None:
    x, low = torch.ones(64, 64).bfloat16(), torch.ones(64, 16).bfloat16()
    x[40, 7] = float("nan")
    assert lora_products.gather(x, low)[:, 7].isnan().all() and not lora_products.gather(x, low)[:, 8].isnan().any()
    assert lora_products.project(x, low.t().contiguous())[40].isnan().all()


@needs_units
def test_what_does_not_fit_is_left_to_torch() -> None:
    x = torch.ones(64, 64).bfloat16()
    assert lora_products.supports(x, x)
    for other in (x.float(), x.t(), x[:, :48], x[:, ::2]):
        assert not lora_products.supports(x, other)
    assert not lora_products.supports(x[:33])
    torch.set_num_threads(2)
    assert not lora_products.supports(x)


def layers(rank: int, bias: bool) -> torch.nn.Module:
    torch.manual_seed(0)

    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (torch.nn.Linear(64, n, bias=bias) for n in (96, 32, 32))
            self.o_proj = torch.nn.Linear(96, 64, bias=bias)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
            return self.o_proj(torch.tanh(q) * torch.cat([k, v, k * v], -1))

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], init_lora_weights=False)
    model = get_peft_model(Attention().bfloat16(), config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1
    fused_lora.fuse(model)
    return model


def gradients(model: torch.nn.Module, tokens: int) -> dict[str, torch.Tensor]:
    x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(1)).to(next(model.parameters()).dtype).requires_grad_()
    model.zero_grad()
    model(x).float().square().mean().backward()
    return {"x": x.grad.clone()} | {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@needs_units
@pytest.mark.parametrize("rank", [4, 16, 40])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_learns_with_them_what_it_learns_without(rank: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = layers(rank, bias), []
    fits = lora_products.supports
    monkeypatch.setattr(lora_products, "supports", lambda *given: asked.append(fits(*given)) or asked[-1])
    ours = gradients(model, 96)
    assert len(asked) == 4 and all(asked), "q, k and v together and o, each way"
    monkeypatch.setattr(lora_products, "supports", lambda *_: False)
    without = gradients(model, 96)
    exact = gradients(layers(rank, bias).float(), 96)
    assert ours.keys() == without.keys() == exact.keys()
    for name, wanted in exact.items():
        assert ours[name].shape == wanted.shape and ours[name].dtype == without[name].dtype
        assert apart(ours[name], wanted.double()) < 1.2 * apart(without[name], wanted.double()) + 1e-3, name


@needs_units
def test_threads_beside_each_other_do_not_disturb_one_another() -> None:
    torch.manual_seed(0)
    x, low = torch.randn(256, 96).bfloat16(), torch.randn(256, 16).bfloat16()
    wanted, found = lora_products.gather(x, low), []

    def work() -> None:
        torch.set_num_threads(1)
        found.extend(torch.equal(lora_products.gather(x, low), wanted) for _ in range(200))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 600 and all(found)


@needs_units
def test_what_would_be_read_beyond_its_end_is_refused() -> None:
    x, low, up = (torch.ones(64, n).bfloat16() for n in (64, 16, 16))
    for wrong in (lambda: lora_products.gather(x[:40], low[:40]), lambda: lora_products.gather(x, low[:32]), lambda: lora_products.gather(x, low.float()),
                  lambda: lora_products.project(x, low), lambda: lora_products.both(x, up, low, low.t()), lambda: lora_products.gather(x.t(), low)):  # fmt: skip
        with pytest.raises(ValueError, match=r"needed|multiples of 32"):
            wrong()
