"""Passes as CUDA graphs, without a GPU: real jobs whose passes are on a tape learn, to the bit, what they learn without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from app import events
from app.machines.hardware import Machine
from app.planning.memory import captures_passes
from app.run_settings import RunSettings
from app.shapes import shape_of
from app.strategies import STRATEGIES
from benchmarks.shapes import config_of
from tests.tape import Tape
from tests.worker.modeling.test_new_tokens import variant
from tests.worker.orders import chat_rows, order, put_dataset, put_model
from tests.worker.training.test_step_shapes import CPU, Framed, kernel  # noqa: F401  # a fixture
from worker import train
from worker.kernels.cpu import attention, jit, lora_products
from worker.modeling import fused_layers, fused_lora
from worker.training import backends
from worker.training.backends import graphed
from worker.training.backends._base import PlainBackend
from worker.training.backends.graphed import CapturedPass, GraphedBackend

STEPS, PASSES = 3, 2
KINDS = ("lora", "full")


@pytest.fixture(autouse=True)
def _as_on_a_gpu(kernel: None, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:  # noqa: F811
    """What a processor has of its own is no operation of torch's, and not on a tape."""
    for module in (jit, attention, lora_products):
        monkeypatch.setattr(module, "is_available", lambda: False)
    for name in ("patch_gated_mlp", "patch_rotary"):
        monkeypatch.setattr(fused_layers, name, lambda *_: 0)
    monkeypatch.setattr(fused_lora, "_kept", lambda *_: None)  # factors that are rounded once a step, on the host
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


class Learned(NamedTuple):
    steps: list[tuple[float, float]]  # loss and gradient norm
    log: list[str]
    weights: list[torch.Tensor]


class Jobs:
    def __init__(self, tiny_model: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tiny_model, self.data_dir, self.monkeypatch, self.count = tiny_model, data_dir, monkeypatch, 0

    def run(
        self,
        make: Callable[[Any], PlainBackend],
        name: str = "lora",
        settings: dict[str, Any] | None = None,
        until: int = STEPS,
        attempt: int = 1,
        **run: Any,
    ) -> Learned:
        """The steps of a job up to one, with evaluations in between, whose backend `make` makes. A later attempt goes on with the last job."""
        own = STRATEGIES[name]
        engine = Framed(CPU, "cpu", "bf16", torch.bfloat16 if own.adapter else torch.float32, 1)
        self.monkeypatch.setattr(train, "choose", lambda *_: engine)
        made = []
        self.monkeypatch.setattr(backends, "choose", lambda *_: made.append(make(engine)) or made[0])
        no_dropout = {"dropout": 0.0} if "dropout" in own.model_fields else {}
        given = {
            "max_tokens_per_step": 160 * PASSES,
            "micro_batches": PASSES,
            "max_steps": STEPS,
            "evaluations_per_epoch": 0,
            "eval_steps": 2,
        }
        spec = order(
            put_model(self.tiny_model), put_dataset(chat_rows(60)), name, no_dropout | (settings or {}),
            **(given | run), row_losses=False, precision="bf16",
        )  # fmt: skip
        self.count += attempt == 1
        steps, log = [], []
        for event in train.train(spec, self.data_dir / "runs" / str(self.count) / f"a{attempt}"):
            if isinstance(event, events.Log):
                log.append(event.message)
            if isinstance(event, events.Step):
                steps.append((event.loss, event.grad_norm))
                if event.step == until:
                    break
        return Learned(steps, log, [p.detach().clone() for p in made[0].trained.values()])


PLAIN_LORA: list[Learned] = []
"""What a job learns without graphs, computed once."""


def plain_lora(jobs: Jobs) -> Learned:
    PLAIN_LORA[:] = PLAIN_LORA or [jobs.run(PlainBackend)]
    return PLAIN_LORA[0]


@pytest.fixture
def jobs(tiny_model: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Jobs:
    return Jobs(tiny_model, data_dir, monkeypatch)


class Taped(GraphedBackend):
    """What `GraphedBackend` is on a GPU, with a tape in the place of a graph."""

    def __init__(self, engine: Any) -> None:
        self.tapes: list[Tape] = []

        def record(run: Any, *, warm: bool) -> Tape:
            assert not warm, "it would add its gradients"
            self.tapes.append(Tape(run))
            return self.tapes[-1]

        super().__init__(engine, record)


@pytest.mark.long
@pytest.mark.parametrize("name", KINDS)
def test_replayed_passes_learn_the_same_to_the_bit(jobs: Jobs, name: str, tmp_path: Path) -> None:
    """Several passes a step, which add to the same gradients, moved weights, and evaluations in between."""
    if name == "full":  # with one table for both see below
        jobs.tiny_model = variant(jobs.tiny_model, tmp_path / "untied", tie_word_embeddings=False)
    made: list[Taped] = []
    plain = plain_lora(jobs) if name == "lora" else jobs.run(PlainBackend, name)
    taped = jobs.run(lambda engine: made.append(Taped(engine)) or made[0], name)
    assert taped.steps == plain.steps and len({loss for loss, _ in plain.steps}) == STEPS
    assert all(torch.equal(a, b) for a, b in zip(taped.weights, plain.weights, strict=True))
    assert made[0].capture is not None and sum(made[0].seen.values()) == STEPS * PASSES
    replays = sum(max(0, count - graphed.CAPTURED_AT) for count in made[0].seen.values())
    assert sum(tape.replays for tape in made[0].tapes) == 2 * replays > STEPS * PASSES
    assert not [text for text in taped.log if "CUDA graphs" in text]


@pytest.mark.long
def test_a_resumed_job_captures_again_and_learns_the_same(jobs: Jobs) -> None:
    made: list[Taped] = []

    def taped(engine: Any) -> Taped:
        made.append(Taped(engine))
        return made[-1]

    plain = jobs.run(PlainBackend, max_steps=6, until=6)
    first = jobs.run(taped, max_steps=6, until=3)  # its last checkpoint is that of step 2
    again = jobs.run(taped, max_steps=6, until=6, attempt=2)
    assert first.steps == plain.steps[:3] and again.steps == plain.steps[2:]
    assert all(torch.equal(a, b) for a, b in zip(again.weights, plain.weights, strict=True))
    assert [sum(tape.replays for tape in one.tapes) > 0 for one in made] == [True, True] and not [
        t for t in again.log if "CUDA graphs" in t
    ]


@pytest.mark.long
def test_a_table_that_is_head_and_embedding_adds_its_gradients_in_another_order(jobs: Jobs) -> None:
    """Autograd adds up both gradients of a pass before it adds them to those of the passes before; a replayed pass adds its own by itself."""
    made: list[Taped] = []
    plain = jobs.run(PlainBackend, "full")
    taped = jobs.run(lambda engine: made.append(Taped(engine)) or made[0], "full")
    assert sum(tape.replays for tape in made[0].tapes) and made[0].capture is not None
    assert taped.steps == [pytest.approx(step, rel=1e-5) for step in plain.steps]
    assert max(float((a - b).abs().max()) for a, b in zip(taped.weights, plain.weights, strict=True)) < 1e-5


@pytest.mark.long
@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("refused", "operation not permitted when stream is capturing"),
        ("stale", "other gradients than a computed one"),
        ("moved", "weights or gradients are not where they were"),
    ],
)
def test_what_goes_wrong_leaves_the_plain_step_and_a_remark(jobs: Jobs, monkeypatch: pytest.MonkeyPatch, change: str, why: str) -> None:
    class Wrong(Taped):
        def zero_grad(self) -> None:
            super().zero_grad()
            for weight in self.trained.values():
                if change == "moved":
                    weight.data = weight.data.clone()

    def make(engine: Any) -> Wrong:
        made = Wrong(engine)
        if change == "refused":
            made.capture = refuse
        return made

    def refuse(run: Any, *, warm: bool) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    if change == "stale":
        monkeypatch.setattr(CapturedPass, "fill", lambda self, part: None)
    wrong = jobs.run(make)
    assert wrong.steps == plain_lora(jobs).steps
    (remark,) = [text for text in wrong.log if "CUDA graphs" in text]
    assert why in remark


@pytest.mark.long
def test_passes_that_draw_are_not_captured(jobs: Jobs) -> None:
    made: list[Taped] = []
    found = jobs.run(lambda engine: made.append(Taped(engine)) or made[0], settings={"dropout": 0.2})
    assert not made[0].tapes and len(found.steps) == STEPS
    assert any("draws random numbers" in text for text in found.log)


def test_numbers_that_are_not_finite_agree_with_nothing() -> None:
    good = torch.tensor([1.0, 0.0, 1e-6])
    assert graphed.agree(good, good * 1.01) and not graphed.agree(good, good * 1.2)
    assert not graphed.agree(good, torch.tensor([1.0, 0.2, 0.0])), "a gradient where there was none"
    for bad in (float("nan"), float("inf")):
        assert not graphed.agree(torch.tensor([bad]), torch.tensor([bad])) and not graphed.agree(good, good * bad)


@pytest.mark.parametrize(
    ("shape", "gpu_gb", "checkpointing", "captured"),
    [
        ("starter", 80, "auto", True),
        ("0.5b", 80, "auto", True),
        ("1b", 80, "auto", False),
        ("starter", 24, "auto", False),
        ("0.5b", 12, "none", False),
    ],
)
def test_small_models_whose_step_fits_twice_are_captured(shape: str, gpu_gb: int, checkpointing: str, captured: bool) -> None:
    machine = Machine(
        cores=8, memory_bytes=64 * 2**30, gpu_name="a card", gpu_memory_bytes=gpu_gb * 2**30, gpu_capability=9.0, bf16_pays=True
    )
    run = RunSettings(max_tokens_per_step=16_384, precision="bf16", gradient_checkpointing=checkpointing)
    assert captures_passes(shape_of(config_of(shape).to_dict()), STRATEGIES["lora"](), run, 512, machine) is captured
