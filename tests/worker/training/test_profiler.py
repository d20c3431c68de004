"""The profile: a few steps recorded, told in words, and nothing changed in what is learnt."""

from __future__ import annotations

import json

import pytest

from app import events
from tests.worker.orders import chat_rows, order, put_dataset, put_model
from worker.train import train
from worker.training.profiler import STEPS, WAITING, ProfileWindow, floor_of, kind_of, profiled, summary


@pytest.fixture
def spec(data_dir, tiny_model):
    return order(put_model(tiny_model), put_dataset(chat_rows(24)), epochs=8, max_steps=8)


@pytest.mark.long
def test_a_profiled_job_is_the_same_job(spec, data_dir):
    plain = list(train(spec, data_dir / "runs" / "plain" / "a1"))
    folder = data_dir / "runs" / "seen" / "a1"
    seen = list(profiled(train(spec, folder), spec, folder))
    losses = [[e.loss for e in run if isinstance(e, events.Step)] for run in (plain, seen)]
    assert losses[0] == losses[1]
    text = (folder / "profile" / "summary.txt").read_text()
    assert "matrix products" in text and "Floor:" in text and "Largest gap:" in text
    assert any(isinstance(e, events.Log) and e.message == text.strip() for e in seen)
    names = {e.get("name") for e in json.loads((folder / "profile" / "trace.json").read_text())["traceEvents"]}
    assert any(str(name).startswith("aten::") for name in names)


@pytest.mark.long
def test_a_short_job_says_why_it_has_no_profile(spec, data_dir):
    short = spec.model_copy(update={"run": spec.run.model_copy(update={"max_steps": 4})})
    folder = data_dir / "runs" / "short" / "a1"
    said = list(profiled(train(short, folder), short, folder))
    assert "no profile" in said[-1].message
    assert not (folder / "profile").exists()


def test_the_floor_is_arithmetic(spec):
    """At half of the machine's speed the steps take twice the floor; idle time can be the largest gap."""
    seen = ProfileWindow(tokens=1000, trained=500, seconds=2.0, length=50.0)
    work, moved = floor_of(spec, seen)
    shape = spec.model.shape
    assert work > 7 * 50 * shape.heads * shape.head_dim * shape.layers * 1000
    assert moved == STEPS * (2 * shape.parameters() * 2 + 28 * spec.strategy.trainable(shape))
    text = summary(spec, {"matrix products": 1.0, "copies and casts": 0.25}, seen, work, 1e15)
    assert "2.0 times the floor" in text
    assert "copies and casts (20% of the time)" in text
    assert f"Largest gap: {WAITING}" in summary(spec, {"matrix products": 1.0, WAITING: 1.0}, seen, work, 1e15)


@pytest.mark.parametrize(
    ("operation", "kind"),
    [("aten::mm", "matrix products"), ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"), ("aten::copy_", "copies and casts"),
     ("aten::silu", "activations and other element-wise work"), ("something", "other"),
     # Names that CUDA gives its kernels.
     ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>>", "activations and other element-wise work"),
     ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::sum_functor<float>>>", "activations and other element-wise work"),
     ("void at::native::multi_tensor_apply_kernel<at::native::FusedOptimizerTensorListMetadata<4>, FusedAdamMathFunctor>", "optimizer and clipping"),
     ("softmax_gradient_kernel", "cross-entropy"), ("nvjet_hsh_256x128_64x4_2x1_v_bz_coopA_TNT", "matrix products"),
     ("void flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "attention"), ("Memcpy HtoD (Pinned -> Device)", "copies and casts"),
     ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "between processes")],
)  # fmt: skip
def test_kinds(operation, kind):
    assert kind_of(operation) == kind
