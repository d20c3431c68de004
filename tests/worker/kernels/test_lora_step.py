"""LoRA's layers whose gradients go past autograd: their steps are those that torch's optimizer takes with what autograd gives."""

from __future__ import annotations

import contextlib

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from app.run_settings import RunSettings
from app.strategies import STRATEGIES
from tests.worker.kernels import test_gradient_buffers
from tests.worker.kernels.test_full_tuning import WIDTHS, engine_of
from tests.worker.kernels.test_gradient_buffers import between, equal, one_thread  # noqa: F401
from worker.kernels.cpu import lora_products, lora_step
from worker.modeling import fused_layers, fused_lora, packed_attention
from worker.training import backends, optim
from worker.training.objectives._base import LossOutput

pytestmark = pytest.mark.skipif(not lora_products.is_available(), reason="the processor has no matrix units")
FITTING = {**WIDTHS, "hidden_size": 64, "intermediate_size": 128, "tie_word_embeddings": True}
PRODUCTS = 8  # of two blocks: q, k and v together; o; gate and up together; down


def tuned(biases: bool = False, sizes: dict | None = None, **config) -> torch.nn.Module:
    """A small model in bf16 with LoRA of a correction that is not zero, its layers fused."""
    torch.manual_seed(0)
    sizes = {**FITTING, **(sizes or {})}
    model = (Qwen2ForCausalLM(Qwen2Config(**sizes)) if biases else LlamaForCausalLM(LlamaConfig(**sizes))).bfloat16()
    model.set_attn_implementation(packed_attention.NAME)
    fused_layers.patch_norms_and_mlp(model)
    config = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    model = get_peft_model(model, LoraConfig(**config))
    draw = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or (parameter.requires_grad and parameter.ndim == 2):
            parameter.data = (torch.randn(parameter.shape, generator=draw) * 0.05).to(parameter.dtype)
    fused_lora.fuse(model)
    return model.train()


class Job(test_gradient_buffers.Job):
    """The same of a job with LoRA, its gradients past autograd where `past`."""

    def __init__(
        self, parts=2, threads=2, past=True, longest=1.0, tokens=32, micro_batches=1, recomputed=0, precision="bf16", **model
    ) -> None:
        self.model, self.engine = tuned(**model), engine_of(precision, threads)
        fused_layers.recompute_layers(self.model.get_base_model(), recomputed)
        self.order("lora", parts, longest, tokens, micro_batches, {} if past else {"lora_step": False})

    @property
    def factors(self) -> lora_step.LoraOptimizer | None:
        return self.backend.factors

    def loss(self, model: torch.nn.Module, batch, engine) -> LossOutput:
        return super().loss(model.get_base_model(), batch, engine)


def near(ours: Job, theirs: Job, digits: float) -> bool:
    """Whether two jobs stand at the same weights and moments, as shares of how long all of a kind are together."""
    assert ours.values().keys() == theirs.values().keys()
    return all(between(ours, theirs, start) <= digits for start in ("moved/", "exp_avg/", "exp_avg_sq/", "step/"))


def stands(job: Job) -> bool:
    """Whether what products read are the factors as they are."""
    found = [factor for product in job.factors.products for factor in product.factors()]
    copies = all(torch.equal(f.copy, (f.parameter.detach() * f.scale).bfloat16()) for f in found)
    return copies and all(torch.equal(f.transposed, f.copy.t()) for f in found if f.transposed is not None)


@pytest.mark.parametrize(
    ("given", "model"),
    [
        ({}, {}),
        ({"parts": 1, "threads": 1, "longest": 0.05}, {"r": 4}),
        ({"parts": 3, "threads": 3, "longest": 0}, {"r": 24}),
        ({"micro_batches": 2}, {"use_rslora": True, "r": 8}),
        ({"recomputed": 1}, {"biases": True}),
        ({"longest": 0.01}, {"use_dora": True}),
        ({}, {"target_modules": ["q_proj", "up_proj", "down_proj"]}),
        ({}, {"target_modules": ["v_proj", "o_proj", "gate_proj"], "layers_to_transform": [1]}),
    ],
)
def test_a_step_is_the_one_that_torch_takes(given: dict, model: dict) -> None:
    ours, again, theirs = (Job(past=past, **given, **model) for past in (True, True, False))
    learnt = {id(factor.parameter) for own in ours.factors.every for factor in own}
    assert learnt == {id(p) for name, p in ours.trained.items() if ".lora_A." in name or ".lora_B." in name}
    for number in range(1, 4):
        ((loss, norm),), ((wanted, length),) = ours.go(), theirs.go()
        assert again.go() == [[loss, norm]] and equal(again, ours)
        assert not ours.summed & {name for name, p in ours.trained.items() if id(p) in learnt} and stands(ours)
        assert norm > (given.get("longest") or 0), "so that it is shortened, where it is to be"
        # First the order of sums differs alone, later here and there a digit of bf16.
        share = 1 if number == 1 else 1000
        assert loss == pytest.approx(wanted, rel=1e-6 * share) and norm == pytest.approx(length, rel=1e-5 * share)
        assert near(ours, theirs, 2e-5 * share), number


def test_what_is_kept_goes_on_with_torchs_optimizer_and_the_other_way() -> None:
    """A checkpoint of one is one of the other."""
    ours, theirs = Job(), Job(past=False)
    for one in (ours, theirs):
        one.go()
    for here, there in ((ours, theirs), (theirs, ours)):
        fresh = Job(past=here is theirs)
        with torch.no_grad():
            for name, parameter in fresh.trained.items():
                parameter.copy_(here.trained[name])
        optim.load_state(fresh.optimizer, fresh.trained, optim.state_tensors(here.optimizer, here.trained))
        if fresh.factors:
            fresh.backend.factors = fused_lora.keep(fresh.model, 2, fresh.engine, fresh.optimizer)
        there = Job(past=there.factors is not None)
        for _ in range(2):
            there.go()
        fresh.state.step = 1
        fresh.go()
        assert near(fresh, there, 0.02)


@pytest.mark.parametrize("reached", [(True, False), (False, True), (False, False)])
def test_a_part_that_does_not_fit_is_added_to_those_that_do(reached: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs, takes = Job(), Job(past=False), lora_step.LoraLayerState.supports
    monkeypatch.setattr(lora_step.LoraLayerState, "supports", lambda own, x: reached[own.abreast.place()] and takes(own, x))
    for number in (1, 2):
        ((loss, norm),), ((wanted, length),) = ours.go(), theirs.go()
        assert ours.summed == set(ours.trained) and stands(ours)
        assert loss == pytest.approx(wanted, rel=1e-3) and norm == pytest.approx(length, rel=1e-5 if number == 1 else 1e-2)
        assert near(ours, theirs, 2e-5 if number == 1 else 2e-2)


def test_a_part_without_a_gradient_adds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lay in its room before is not taken for one."""
    ours, theirs = Job(), Job(past=False)
    for one in (ours, theirs):
        one.go()
        loss = one.loss
        one.lesson.loss = lambda model, batch, engine, loss=loss, one=one: (
            loss(model, batch, engine)
            if one.engine.abreast.place() == 0
            else LossOutput(next(iter(one.trained.values())).sum() * 0.0, batch.tokens, batch.trained)
        )
    ((_, norm),), ((_, length),) = ours.go(), theirs.go()
    assert norm == pytest.approx(length, rel=1e-2) and near(ours, theirs, 0.02)


def test_a_layer_that_is_used_twice_has_both_gradients() -> None:
    ours, theirs = Job(), Job(past=False)
    for one in (ours, theirs):
        loss = one.loss

        def twice(model, batch, engine, loss=loss):
            first, second = loss(model, batch, engine), loss(model, batch, engine)
            return first._replace(loss=first.loss + 0.5 * second.loss)

        one.lesson.loss = twice
    ((_, norm),), ((_, length),) = ours.go(), theirs.go()
    assert norm == pytest.approx(length, rel=1e-5) and near(ours, theirs, 2e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_moves_by_what_is_no_number(value: float) -> None:
    job = Job()
    job.go()
    before, job.more = job.values(), value
    job.go()
    after, job.more = job.values(), 0.0
    assert before.keys() == after.keys() and all(torch.equal(before[key], x) for key, x in after.items())
    job.window = job.window._replace(learnt=job.window.learnt * float("nan"))
    job.go()
    assert all(torch.equal(before[key], x) for key, x in job.values().items()) and stands(job)


def test_afterwards_the_layers_are_as_before() -> None:
    job = Job()
    job.go()
    products, batch = len(job.factors.products), job.window.batches[0][0]
    with torch.no_grad():
        kept = job.loss(job.model, batch, job.engine).loss
        job.factors.release()
        assert products == PRODUCTS and not job.factors.products
        assert job.loss(job.model, batch, job.engine).loss == pytest.approx(float(kept), rel=1e-6)
        for parameter in job.trained.values():
            parameter.zero_()
        with job.model.disable_adapter():
            bare = job.loss(job.model, batch, job.engine).loss
        assert torch.equal(job.loss(job.model, batch, job.engine).loss, bare) and not torch.equal(bare, kept)


def test_scoring_between_steps_sees_the_newest_factors() -> None:
    """Also where a whole pack is scored by several threads, which the units do not take."""
    job = Job()
    for _ in range(2):
        job.go()
        with torch.no_grad():
            found = []
            for context in (contextlib.nullcontext(), pytest.MonkeyPatch.context()):
                with context as patch:
                    if patch:
                        patch.setattr(lora_step.LoraLayerState, "supports", lambda own, x: False)
                    found.append(float(job.loss(job.model, job.window.batches[0][0], job.engine).loss))
        assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_what_is_left_to_autograd() -> None:
    def kept(**given) -> int:
        found = Job(**given).factors
        return len(found.products) if found else 0

    assert kept() == PRODUCTS
    assert kept(precision="fp32") == kept(lora_dropout=0.1) == 0
    assert not backends.choose(engine_of("bf16"), STRATEGIES["lora"](), RunSettings(optimizer="lion")).paths.lora_step
    base = LlamaForCausalLM(LlamaConfig(**FITTING)).bfloat16()
    made_anew = STRATEGIES["pissa"](rank=4).attach(base)
    assert fused_lora.fuse(made_anew) == 14
    optimizer = torch.optim.AdamW([p for p in made_anew.parameters() if p.requires_grad])
    assert fused_lora.keep(made_anew, 2, engine_of("bf16"), optimizer) is None
    assert kept(sizes={"intermediate_size": 144}) == PRODUCTS // 2, "gate, up and down are not multiples of 32"


def test_what_would_be_read_beyond_its_end_is_refused() -> None:
    up, down = torch.ones(64, 8).bfloat16(), torch.nn.Parameter(torch.ones(8, 32))
    layers = lora_products.Layers([up], [1.0], 32)
    room, x, dy, low = lora_products.GradientBuffer(layers), *(torch.ones(32, n).bfloat16() for n in (32, 64, 8))
    assert room.take(dy, x, low).shape == (32, 8) and bool((room.ups[0] == 32).all()) and bool((room.down == 64 * 32).all())
    for wrong in (
        (dy[:, :32], x, low),
        (dy, x[:, :16], low),
        (dy, x, low[:, :4]),
        (dy.float(), x, low),
        (dy, x[:16], low),
        (dy, x.float(), low),
    ):
        with pytest.raises(ValueError, match=r"layers of|needed|multiples of 32"):
            room.take(*wrong)
    for ups, width in (([up[:40]], 32), ([up.float()], 32), ([up], 40), ([up.t().contiguous().t()], 32)):
        with pytest.raises(ValueError, match="multiples of 32"):
            lora_products.Layers(ups, [1.0], width)
    with pytest.raises(ValueError, match="multiples of 32"):
        lora_step.LoraLayerState(
            [down], [torch.nn.Parameter(torch.ones(40, 8))], [1.0], torch.ones(40, 32).bfloat16(), None, engine_of("bf16").abreast, 1
        )
