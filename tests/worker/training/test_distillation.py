"""On-policy distillation: the divergence against plain torch, whole jobs from a teacher, and what is refused."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from app import events
from app.models import vocabulary
from app.objectives.distillation import DistillationSettings
from app.settings import get_settings
from app.spec import JobSpec, ModelRef
from tests.worker.orders import WarmTrainer, chat_rows, order, put_dataset, put_model
from tests.worker.training.test_reinforcement import VOWELS, figures
from tests.worker.training.test_train import of, run
from worker.modeling import divergence
from worker.modeling.cross_entropy import Head
from worker.modeling.divergence import divergence_of, token_divergence

pytestmark = pytest.mark.timeout(240)
KINDS = ("reverse_kl", "forward_kl", "jsd")


def put_teacher(tiny_model: Path, noise: float = 0.05) -> ModelRef:
    """The small model with other weights, in a folder of its own."""
    target = get_settings().data_dir / "models" / f"teacher-{noise}"
    if not target.exists():
        shutil.copytree(tiny_model, target)
        weights, draw = load_file(target / "model.safetensors"), torch.Generator().manual_seed(4)
        moved = {name: w + noise * torch.randn(w.shape, generator=draw).to(w.dtype) if w.ndim > 1 else w for name, w in weights.items()}
        save_file(moved, target / "model.safetensors", metadata={"format": "pt"})
    student = put_model(tiny_model)
    return student.model_copy(update={"name": "teacher", "path": target.relative_to(get_settings().data_dir).as_posix()})


def taught(model: Path, strategy: str = "lora", own: dict[str, Any] | None = None, noise: float = 0.05, **more: Any) -> JobSpec:
    given = {"max_steps": 4, "evaluations_per_epoch": 0, "eval_steps": 2, "validation_fraction": 0.3, "max_tokens_per_step": 256, **more}
    spec = order(put_model(model), put_dataset(chat_rows(24)), strategy, **given)
    settings = DistillationSettings(**{"teacher": "teacher", "group_size": 2, "prompts_per_step": 4, "answer_tokens": 12} | (own or {}))
    return spec.model_copy(update={"task": "distillation", "preference": settings, "teacher": put_teacher(model, noise)})


# The divergence ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_divergence_and_its_gradient_are_those_of_plain_torch(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "chunk_rows", lambda *_: 5)  # several chunks, the last one not full
    draw = torch.Generator().manual_seed(3)
    hidden, weight, other, teacher = (
        torch.randn(*size, dtype=torch.float64, generator=draw) for size in ((17, 8), (40, 8), (17, 6), (42, 6))
    )
    for tensor in (hidden, weight):
        tensor.requires_grad_()
    ours = token_divergence(hidden, Head(weight, None), other, Head(teacher, None), kind, torch.float64)
    student, known = (hidden @ weight.T).softmax(1), (other @ teacher[:40].T).softmax(1)
    middle = (student + known) / 2

    def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return (p * (p / q).log()).sum(1)

    plain = {
        "reverse_kl": lambda: kl(student, known),
        "forward_kl": lambda: kl(known, student),
        "jsd": lambda: 0.5 * kl(student, middle) + 0.5 * kl(known, middle),
    }[kind]()
    torch.testing.assert_close(ours, plain)
    found, wanted = (torch.autograd.grad(one.sum(), (hidden, weight)) for one in (ours, plain))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert float(divergence_of(student.log(), student.log(), kind).abs().max()) < 1e-12


# Jobs -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[] if kind == "reverse_kl" else [pytest.mark.fault]) for kind in KINDS])
def test_a_student_comes_closer_to_its_teacher(data_dir: Path, tiny_model: Path, kind: str) -> None:
    own = {"divergence": kind, "answer_tokens": 16}
    said = run(taught(tiny_model, "full", own, max_steps=20, eval_steps=10, epochs=40, learning_rate=3e-3, samples=1), data_dir)
    scored, steps, finished = of(said, events.Evaluated), of(said, events.Step), said[-1]
    assert isinstance(finished, events.Finished) and len(steps) == 20
    assert scored[-1].loss < 0.6 * scored[0].loss and steps[-1].loss < steps[0].loss, [e.loss for e in scored]
    contest = finished.evaluation["contest"]
    assert contest["metric"] == "loss" and contest["base"]["interval"][1] < 0 and contest["base"]["tuned"] < contest["base"]["score"]
    assert set(steps[0].metrics) == {"answer_length", "truncated_answers", "entropy"}
    assert of(said, events.Sampled)[-1].samples[0].answer is not None


def test_a_model_diverges_from_itself_by_nothing(data_dir: Path, tiny_model: Path) -> None:
    """The teacher reads the very tokens that the student drew, at the same places."""
    said = run(taught(tiny_model, noise=0.0, max_steps=1, learning_rate=1e-9), data_dir)
    assert of(said, events.Evaluated)[0].loss == pytest.approx(0, abs=1e-5) and of(said, events.Step)[0].loss == pytest.approx(0, abs=1e-5)
    far = run(taught(tiny_model, max_steps=1, learning_rate=1e-9), data_dir, "far")
    assert of(far, events.Evaluated)[0].loss > 1e-2


@pytest.mark.long
def test_a_resumed_job_is_the_same_job(data_dir: Path, tiny_model: Path) -> None:
    spec = taught(tiny_model, "prompt_tuning", max_steps=6, save_steps=2).model_copy(update={"graders": (VOWELS,)})
    whole, code = WarmTrainer(spec, "whole", 1).run()
    assert code == 0 and "grader_vowels" in of(whole, events.Evaluated)[0].metrics
    trainer = WarmTrainer(spec, "killed", 1)
    said = list(itertools.takewhile(lambda event: not (isinstance(event, events.Step) and event.step == 5), trainer))
    trainer.process.kill()
    trainer.wait()
    again, code = WarmTrainer(spec, "killed", 2).run()
    began = of(again, events.Started)[0]
    assert code == 0 and began.resumed_from == 4 and began.exact
    assert figures(said)[:4] + figures(again) == figures(whole) and again[-1].evaluation == whole[-1].evaluation


def test_another_vocabulary_is_found_by_its_tokens(data_dir: Path, tiny_model: Path) -> None:
    student, teacher = put_model(tiny_model), put_teacher(tiny_model)
    assert vocabulary.why_apart(student, teacher) == ""
    path = data_dir / teacher.path / "tokenizer.json"
    told = json.loads(path.read_text())
    words = list(told["model"]["vocab"])
    one, two = words[-2:]
    told["model"]["vocab"][one], told["model"]["vocab"][two] = told["model"]["vocab"][two], told["model"]["vocab"][one]
    path.write_text(json.dumps(told))
    count = len(set(words) | {token["content"] for token in told["added_tokens"]})
    assert f"only {count - 2:,} of the {count:,} tokens of tiny" in vocabulary.why_apart(student, teacher)
    path.unlink()
    assert "teacher has no tokenizer.json" in vocabulary.why_apart(student, teacher)
