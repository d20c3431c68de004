"""Every fast way to compute a step trains what the plain one trains, and the plain one uses none of them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from app import events
from app.errors import BadField, DoesNotFit
from app.run_settings import RunSettings
from app.settings import PROJECT, get_settings
from app.spec import JobSpec
from app.strategies import STRATEGIES
from tests.worker.orders import chat_rows, order, put_dataset, put_model
from worker.kernels.cpu import jit, lora_products
from worker.modeling import cross_entropy, fused_dora, fused_ia3, fused_lora, fused_vera, token_logprobs  # noqa: F401  # imported before anything is watched
from worker.modeling.cross_entropy import Head, linear_cross_entropy
from worker.modeling.token_logprobs import token_nats
from worker.runtime import device
from worker.runtime.device import Compute
from worker.supervision import exit_codes
from worker.train import StopSignals, train
from worker.training import backends
from worker.training.backends.fsdp import FsdpBackend
from worker.training.backends.threaded_cpu import CpuPaths

LABELS = ("wood", "sound", "part")
ROWS = {
    "generation": chat_rows(48),
    "classification": [{"text": row["messages"][1]["content"], "label": LABELS[i % 3]} for i, row in enumerate(chat_rows(48))],
    "preference": [
        {"messages": row["messages"][:1], "chosen": row["messages"][1:], "rejected": [{"role": "assistant", "content": f"No {i}."}]}
        for i, row in enumerate(chat_rows(48))
    ],
    "kto": [{"messages": row["messages"][:1], "answer": row["messages"][1:], "good": i % 3 > 0} for i, row in enumerate(chat_rows(48))],
}
FORMATS = {"generation": "chat", "classification": "classification", "preference": "preference", "kto": "rated"}
QUICK = {
    "max_tokens_per_step": 600,
    "max_steps": 6,
    "evaluations_per_epoch": 0,
    "row_losses": False,
    "validation_fraction": 0,
    "learning_rate": 1e-3,
}
STEPS = 4  # that are looked at

WITHIN = {"fp32": (2e-5, 1e-3), "bf16": (1e-2, 5e-2)}
"""How far the loss and the gradient's norm of a step may differ, as shares. In float32 sums are taken in another order. In bf16 a number keeps
8 bits, so one rounding is 2⁻⁹ of it, and where the plain layers round a product, then a correction, then their sum, the fast ones round once."""


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    yield
    torch.set_num_threads(before)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets `LUTHIER_KERNELS`."""

    def set_to(value: str) -> None:
        monkeypatch.setenv("LUTHIER_KERNELS", value)
        get_settings.cache_clear()

    return set_to


def spec_of(tiny_model: Path, name: str, task: str, **run: Any) -> JobSpec:
    model, kind = put_model(tiny_model), STRATEGIES[name]
    if why := kind().unavailable(model.shape, task=task, cuda=torch.cuda.is_available()):
        pytest.skip(why)
    settings = {"dropout": 0.0} if "dropout" in kind.model_fields else {}  # the two ways would draw in another order
    spec = order(model, put_dataset(ROWS[task], FORMATS[task]), name, settings, **(QUICK | run))
    return spec.model_copy(update={"task": task})


def losses(said: list[events.TrainerEvent]) -> list[float]:
    return [event.loss for event in said if isinstance(event, events.Step)]


def started(said: list[events.TrainerEvent]) -> events.Started:
    return next(event for event in said if isinstance(event, events.Started))


# Plain and fast on the same data --------------------------------------------------------------------------------------

BOTH = [
    (name, kind.tasks[0], precision)
    for name, kind in STRATEGIES.items()
    for precision in ("fp32", "bf16")
    if precision == "fp32" or kind().trains_in_bf16()  # elsewhere nobody takes bf16 on a CPU but who asks for it
]
MORE = [(name, task, precision) for name in ("lora", "full") for task in ("classification", "preference") for precision in ("fp32", "bf16")]
MORE += [(name, "kto", "fp32") for name in ("lora", "full")]


@pytest.mark.long
@pytest.mark.parametrize(("name", "task", "precision"), [*BOTH, *MORE])
def test_plain_and_fast_have_one_loss_curve(data_dir, tiny_model, kernels, name: str, task: str, precision: str) -> None:
    spec, curves = spec_of(tiny_model, name, task, precision=precision), {}
    norms = {}
    for value in ("auto", "plain"):
        kernels(value)
        said = []
        for event in train(spec, data_dir / "runs" / value / "a1"):
            said.append(event)
            if isinstance(event, events.Step) and event.step == STEPS:
                break
        curves[value], norms[value] = losses(said), [event.grad_norm for event in said if isinstance(event, events.Step)]
        features = STRATEGIES[name].recipe == "features"
        assert features or started(said).details["backend"] == ("threaded_cpu" if value == "auto" else "plain")
        assert started(said).details.get("kernels", "auto") == value
    assert len(curves["auto"]) == len(curves["plain"]) > 0
    assert len(curves["auto"]) == 1 or len(set(curves["auto"])) > 1, "nothing moved"
    assert curves["auto"] == pytest.approx(curves["plain"], rel=WITHIN[precision][0])
    assert norms["auto"] == pytest.approx(norms["plain"], rel=WITHIN[precision][1])


# With plain no kernel -------------------------------------------------------------------------------------------------

KERNELS = [str(PROJECT / "worker" / "kernels" / kind) for kind in ("cpu", "gpu")]
FUSED = [str(PROJECT / "worker" / "modeling" / f"fused_{name}.py") for name in ("lora", "dora", "vera", "ia3")]
LOSSES = [cross_entropy.__file__, token_logprobs.__file__]
PREDICATES = {("attention.py", "supports"), ("rotary.py", "chosen")}
"""They ask whether kernels are allowed. The second stays in a module that all models of a process share, once one was patched."""


class Watch:
    """Notes every function of a kernel, a fused layer or a fused loss that any thread of this process calls, as (file, function)."""

    def __init__(self) -> None:
        self.called: set[tuple[str, str]] = set()

    def note(self, frame: Any, event: str, _: Any) -> None:
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        ours = path.startswith((*KERNELS, *FUSED)) or (path in LOSSES and name in ("forward", "backward", "kernel_works"))
        if event == "call" and ours and name not in ("<module>", "_count"):  # the latter counts the steps of any optimizer
            self.called.add((Path(path).name, name))

    def __enter__(self) -> Watch:
        threading.setprofile(self.note)
        sys.setprofile(self.note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)


USING = [
    ("lora", "generation", {"rms_norm.py", "gated_mlp.py", "rotary.py", "cross_entropy.py", "fused_lora.py"}),
    ("full", "generation", {"rms_norm.py", "full_tuning.py", "gradient_buffers.py", "adamw.py", "cross_entropy.py"}),
    *(pytest.param(name, "generation", {f"fused_{name}.py"}, marks=pytest.mark.fault) for name in ("vera", "ia3", "dora")),
    ("lora", "preference", {"token_logprobs.py"}),
    pytest.param("full", "classification", {"full_tuning.py"}, marks=pytest.mark.fault),
    ("feature_extraction", "classification", {"rms_norm.py"}),
]


@pytest.mark.long
@pytest.mark.parametrize(("name", "task", "files"), USING)
def test_with_plain_no_kernel_is_called(data_dir, tiny_model, kernels, name: str, task: str, files: set[str]) -> None:
    spec = spec_of(tiny_model, name, task, precision="bf16", max_steps=2, samples=1, row_losses=True, validation_fraction=0.1)
    kernels("plain")
    with Watch() as watch:
        said = list(train(spec, data_dir / "runs" / "plain" / "a1"))
    assert watch.called <= PREDICATES and isinstance(said[-1], events.Finished)
    kernels("auto")
    with Watch() as watch:  # the same job with kernels, so that the watch is known to see them
        list(train(spec, data_dir / "runs" / "auto" / "a1"))
    assert files <= {file for file, _ in watch.called}
    if name == "lora" and lora_products.is_available():
        assert {("lora_step.py", "move"), ("attention.py", "supports")} <= watch.called


def test_layers_patched_before_are_plain_when_kernels_are_switched_off(data_dir, tiny_model, kernels) -> None:
    """Rotary embeddings are patched in a module that all models of a process share."""
    spec = spec_of(tiny_model, "lora", "generation", max_steps=1)
    kernels("auto")
    assert losses(list(train(spec, data_dir / "runs" / "auto" / "a1")))
    kernels("plain")
    with Watch() as watch:
        assert losses(list(train(spec, data_dir / "runs" / "plain" / "a1")))
    assert watch.called <= PREDICATES


HEADS = {"as it is": {}, "scaled": {"scale": 0.7}, "capped": {"cap": 5.0}, "a bias": {"bias": True}}


@pytest.mark.parametrize("how", HEADS)
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_the_plain_loss_is_what_the_others_compute(data_dir, kernels, how: str, compute: torch.dtype) -> None:
    draw, found = torch.Generator().manual_seed(3), {}
    states, weight = torch.randn(70, 16, generator=draw), torch.randn(300, 16, generator=draw)
    targets, given = torch.randint(0, 300, (70,), generator=draw), dict(HEADS[how])
    bias = torch.randn(300, generator=draw) if given.pop("bias", False) else None
    for value in ("auto", "plain"):
        kernels(value)
        for loss in (linear_cross_entropy, token_nats):
            wanted = targets.clone()
            if loss is linear_cross_entropy:
                wanted[::7] = -100  # fills a pack up, and is not trained on
            leaves = [x.clone().requires_grad_() for x in (states, weight, *([] if bias is None else [bias]))]
            total = loss(leaves[0], Head(leaves[1], leaves[2] if bias is not None else None, **given), wanted, compute)
            (total * torch.linspace(0.5, 1.5, total.numel()).view(total.shape)).sum().backward()
            found[value, loss] = [total.detach(), *(x.grad for x in leaves)]
    for loss in (linear_cross_entropy, token_nats):
        for ours, plain in zip(found["auto", loss], found["plain", loss], strict=True):
            assert (ours - plain).norm() <= (1e-5 if compute == torch.float32 else 1e-2) * plain.norm()


# Which one is chosen --------------------------------------------------------------------------------------------------


def engine_on(where: str, precision: Any = "bf16") -> Compute:
    return Compute(torch.device(where), where, precision, torch.float32, 2)


def test_one_place_chooses(data_dir, kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    lora, full, run = STRATEGIES["lora"](), STRATEGIES["full"](), RunSettings()
    here, units = engine_on("cpu"), lora_products.is_available()

    def paths(strategy: Any, run: RunSettings, engine: Compute = here) -> CpuPaths:
        return backends.choose(engine, strategy, run).paths

    assert paths(lora, run) == CpuPaths(own_gradients=True, lora_step=units)
    assert paths(full, run) == CpuPaths(master_weights=True, gradient_buffers=jit.is_available())
    assert paths(full, run, engine_on("cpu", "fp32")) == paths(full, RunSettings(optimizer="lion")) == CpuPaths(master_weights=True)
    assert paths(full, RunSettings(micro_batches=2)) == CpuPaths(master_weights=True), "gradients of two packs are summed"
    assert paths(lora, RunSettings(optimizer="lion")) == CpuPaths(own_gradients=True)
    assert {backends.choose(engine_on("cuda"), strategy, run).name for strategy in (lora, full)} == {"plain"}
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert paths(lora, run) == CpuPaths(own_gradients=True)
    assert isinstance(backends.choose(here, full, run), FsdpBackend) and isinstance(
        backends.choose(engine_on("cuda"), full, run), FsdpBackend
    )
    kernels("plain")
    assert {backends.choose(engine_on(where), strategy, run).name for strategy in (lora, full) for where in ("cpu", "cuda")} == {"plain"}
    assert backends.choose(engine_on("cuda", "fp16"), lora, run).name == "loss_scaled", "without it the gradients are 0"
    assert here.parts(4096) == 1 and here.facts()["kernels"] == "plain" and here.rounding != replace(here, precision="fp32").rounding
    kernels("auto")
    assert backends.choose(engine_on("cuda", "fp16"), lora, run).name == "loss_scaled"
    assert here.parts(4096) == 2 and "kernels" not in here.facts() and here.rounding == here.precision


def test_a_job_that_is_resumed_with_other_kernels_says_so(data_dir, tiny_model, kernels) -> None:
    spec, control, runs = spec_of(tiny_model, "lora", "generation", max_steps=4), StopSignals(), data_dir / "runs" / "job"
    for event in train(spec, runs / "a1", runs, control):
        control.stop = control.stop or isinstance(event, events.Step)
    kernels("plain")
    said = list(train(spec, runs / "a2", runs))
    assert started(said).resumed_from == 1 and not started(said).exact
    assert any(isinstance(event, events.Log) and "kernels: None → plain" in event.message for event in said)
    assert isinstance(said[-1], events.Finished)


# The setting ----------------------------------------------------------------------------------------------------------


def test_another_value_is_refused_at_start(data_dir, monkeypatch: pytest.MonkeyPatch) -> None:
    from app.cli import choose

    monkeypatch.setenv("LUTHIER_KERNELS", "fast")
    with pytest.raises(BadField, match="LUTHIER_KERNELS cannot be 'fast'") as caught:
        choose()
    assert "'auto' or 'plain'" in caught.value.hint


def test_trainers_get_it_and_fp8_is_refused(data_dir, kernels) -> None:
    kernels("plain")
    assert exit_codes.trainer_environment({"LUTHIER_KERNELS": "plain"})["LUTHIER_KERNELS"] == "plain"
    with pytest.raises(DoesNotFit, match="LUTHIER_KERNELS is plain"):
        device.choose(RunSettings(frozen_weights="fp8"), STRATEGIES["lora"]())
