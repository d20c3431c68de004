"""Whole jobs in this process: `list(train(spec, folder))`, with no database, queue or subprocess."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from app import events
from app.errors import BadData
from app.kit import manifest
from app.spec import Adapter, JobSpec
from tests.worker.orders import chat_rows, order, put_dataset, put_model
from worker import train
from worker.data.batching import BadRow, Row, split
from worker.modeling.loading import load_model, load_tokenizer
from worker.run import failed
from worker.runtime.failures import Diverged
from worker.training import checkpoint
from worker.training.objectives import causal_lm


def run(spec: JobSpec, data_dir: Path, job: str = "job") -> list:
    return list(train.train(spec, data_dir / "runs" / job / "a1"))


def of(said: list, kind: type) -> list:
    return [event for event in said if isinstance(event, kind)]


@pytest.mark.parametrize("strategy", ["lora", "full", "prefix_tuning"])
def test_a_whole_job(data_dir: Path, tiny_model: Path, strategy: str) -> None:
    model = put_model(tiny_model)
    spec = order(model, put_dataset(chat_rows()), strategy, epochs=6, samples=2, sample_tokens=6, learning_rate=2e-2)
    said = run(spec, data_dir)
    (started,), finished, steps = of(said, events.Started), said[-1], of(said, events.Step)
    assert isinstance(finished, events.Finished)
    assert [s.step for s in steps] == list(range(1, started.total_steps + 1))
    losses = [step.loss for step in steps]
    assert sum(losses[-6:]) / 6 < sum(losses[:6]) / 6 - 0.03
    assert started.trainable_parameters == spec.strategy.trainable(model.shape)
    assert of(said, events.Evaluated)[0].step == 0
    assert finished.evaluation["tuned"]["loss"] < finished.evaluation["base"]["loss"]
    assert all(len(e.samples) == 2 and all(s.base is not None for s in e.samples) for e in of(said, events.Sampled))
    made = manifest.verify(data_dir / finished.path)
    assert made["revision"] == finished.revision and {"README.md", "strategy.json", "tokenizer.json"} <= set(made["files"])
    assert str(data_dir) not in "".join(p.read_text() for p in (data_dir / finished.path).iterdir() if p.suffix in (".json", ".md"))

    adapters = (Adapter(strategy=strategy, path=finished.path, sha256=finished.adapter_sha256),) if finished.adapter_sha256 else ()
    tuned = model.model_copy(update={"adapters": adapters} if adapters else {"path": finished.path})
    loaded, ids = load_model(tuned), torch.tensor([load_tokenizer(tuned)("The belly is made of").input_ids])
    assert torch.isfinite(loaded(ids).logits).all() and not torch.equal(loaded(ids).logits, load_model(model)(ids).logits)


def test_equal_orders_give_equal_weights_and_accumulation_changes_nothing(data_dir: Path, tiny_model: Path) -> None:
    model, data = put_model(tiny_model), put_dataset(chat_rows())
    first, second = (run(order(model, data), data_dir, job) for job in ("first", "second"))
    assert first[-1].adapter_sha256 == second[-1].adapter_sha256
    assert [e.loss for e in of(first, events.Step)] == [e.loss for e in of(second, events.Step)]


def test_the_loss_of_a_step_is_its_packs_together(data_dir: Path, tiny_model: Path) -> None:
    """Normalised by the tokens learnt in the whole window, not by the mean of the packs' means."""
    model, data = put_model(tiny_model), put_dataset(chat_rows(12))
    run_settings = {"epochs": 1, "validation_fraction": 0, "max_steps": 1, "warmup_fraction": 0, "max_grad_norm": 0, "precision": "fp32"}
    whole = run(order(model, data, max_tokens_per_step=4000, **run_settings), data_dir, "whole")
    parts = run(order(model, data, max_tokens_per_step=600, micro_batches=2, **run_settings), data_dir, "parts")
    one, two = of(whole, events.Step)[0], of(parts, events.Step)[0]
    assert one.trained_tokens == two.trained_tokens
    assert one.loss == pytest.approx(two.loss, abs=1e-5) and one.grad_norm == pytest.approx(two.grad_norm, rel=1e-4)


def test_it_stops_early_and_keeps_the_best(data_dir: Path, tiny_model: Path) -> None:
    spec = order(put_model(tiny_model), put_dataset(chat_rows()), "full", epochs=60, learning_rate=3e-2, early_stopping_patience=2)
    said = run(spec, data_dir)
    finished, scored = said[-1], [e for e in of(said, events.Evaluated) if e.step]
    best = min(scored, key=lambda e: e.loss)
    assert finished.reason == "early_stopped" and finished.best_step == best.step and finished.step == scored[-1].step
    kept = next(e for e in of(said, events.Saved) if e.step == best.step)
    ours, theirs = (load_file(data_dir / p / "model.safetensors") for p in (finished.path, kept.path + "/weights"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert len(list((data_dir / "runs/job").glob("a1/checkpoint-*"))) <= 3


def test_a_loss_that_left_its_start_behind_stops_the_job(data_dir: Path, tiny_model: Path) -> None:
    run_away = {"learning_rate": 10.0, "max_grad_norm": 0, "epochs": 40, "warmup_fraction": 0, "max_tokens_per_step": 128}
    with pytest.raises(Diverged) as caught:
        run(order(put_model(tiny_model), put_dataset(chat_rows()), "full", **run_away), data_dir)
    assert "The training loss rose from" in caught.value.message and "Lower the learning rate to 1" in caught.value.hint


def test_a_job_that_diverges_says_so(data_dir: Path, tiny_model: Path) -> None:
    spec = order(put_model(tiny_model), put_dataset(chat_rows()), "full", learning_rate=10.0, max_grad_norm=0, epochs=40, warmup_fraction=0)
    poisoned = causal_lm.linear_cross_entropy

    def not_a_number(*arguments):
        return poisoned(*arguments) * math.nan

    causal_lm.linear_cross_entropy = not_a_number
    try:
        with pytest.raises(Diverged) as caught:
            run(spec, data_dir)
    finally:
        causal_lm.linear_cross_entropy = poisoned
    said = failed(caught.value, spec, 3)
    assert said.kind == "diverged" and said.suggestion == {"learning_rate": 1.0}


def test_rows_with_nothing_to_learn_are_left_out(data_dir: Path, tiny_model: Path) -> None:
    rows = chat_rows()
    rows[4]["messages"][1]["weight"] = 0
    said = run(order(put_model(tiny_model), put_dataset(rows), epochs=1), data_dir)
    assert any("lines 5" in e.message for e in of(said, events.Log))
    assert said[-1].kind == "dialogue"


def test_no_row_left(data_dir: Path, tiny_model: Path) -> None:
    spec = order(put_model(tiny_model), put_dataset(chat_rows()), max_length=8)
    with pytest.raises(BadData, match="None of the 22 rows"):
        run(spec, data_dir)


def test_a_row_the_template_refuses_is_named_by_its_line(data_dir: Path, tiny_model: Path) -> None:
    rows = chat_rows()
    rows[6] = {"messages": "not a list"}
    with pytest.raises(BadRow) as caught:
        run(order(put_model(tiny_model), put_dataset(rows), validation_fraction=0), data_dir)
    said = failed(caught.value, order(put_model(tiny_model), put_dataset(rows)), None)
    assert said.kind == "bad_data" and said.line == 7 and said.message.startswith("Line 7:")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), "out_of_memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), "out_of_memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "cuda_out_of_memory"),
        (torch.AcceleratorError("CUDA error: out of memory"), "cuda_out_of_memory"),
        (torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"), "gpu_fault"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"), "gpu_fault"),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), "crashed"),
        (BadData("a row that says: CUDA error: unspecified launch failure"), "bad_data"),
        (OSError(28, "No space left on device"), "disk_full"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "disk_full"),
        (BadData("x"), "bad_data"),
        (ZeroDivisionError("x"), "crashed"),
    ],
)
def test_every_failure_has_its_name(data_dir: Path, tiny_model: Path, error: BaseException, kind: str) -> None:
    said = failed(error, order(put_model(tiny_model), put_dataset(chat_rows(3))), 7)
    assert said.kind == kind and said.step == 7 and said.message
    assert (said.suggestion is not None) == kind.endswith("out_of_memory"), "one click that mends it, where one can"


def test_after_the_memory_ran_out_once_every_layer_is_recomputed(data_dir: Path, tiny_model: Path) -> None:
    """The first such failure offers that, and leaves a mark by which the next attempt does it; the second one offers smaller passes."""
    spec, first = order(put_model(tiny_model), put_dataset(chat_rows()), max_steps=2), data_dir / "runs" / "job" / "a1"
    first.mkdir(parents=True)
    error = torch.OutOfMemoryError("CUDA out of memory")
    assert failed(error, spec, 7, first).suggestion == {"gradient_checkpointing": "all"}
    said = list(train.train(spec, first.parent / "a2"))
    assert of(said, events.Started)[0].details["recomputed_layers"] == spec.model.shape.layers
    assert any("ran out of memory" in event.message for event in of(said, events.Log)) and isinstance(said[-1], events.Finished)
    assert "gradient_checkpointing" not in failed(error, spec, 7, first.parent / "a2").suggestion


def test_without_the_mark_no_attempt_follows_by_itself(data_dir: Path, tiny_model: Path) -> None:
    """It would run out of memory again, and so would the next: what is offered instead is a setting that a person takes."""
    spec = order(put_model(tiny_model), put_dataset(chat_rows(3)))
    error, unwritable = torch.OutOfMemoryError("CUDA out of memory"), Path("/proc/self")  # no file can be created there, by root neither
    with pytest.raises(OSError):
        (unwritable / "file").touch()
    assert failed(error, spec, 7, unwritable).suggestion == {"micro_batches": 2}


def test_what_is_offered_makes_the_largest_pass_smaller(data_dir: Path, tiny_model: Path) -> None:
    """More passes while a pass is more than one row; where the longest row is a pass of its own they would only take time."""

    def offered(longest: int, **run: Any) -> dict[str, Any] | None:
        return failed(MemoryError(), order(put_model(tiny_model), put_dataset(chat_rows(3)), **run), None, None, longest).suggestion

    assert offered(256, max_tokens_per_step=2048) == {"micro_batches": 2} == offered(0, max_tokens_per_step=2048)
    assert offered(256, max_tokens_per_step=2048, micro_batches=8) == {"max_length": 128}
    assert offered(256, max_tokens_per_step=None, batch_size=8) == {"micro_batches": 2}
    assert offered(256, max_tokens_per_step=None, batch_size=3) is None


def test_the_split_follows_from_content() -> None:
    rows = [Row(i, {"text": f"row {i % 40}"}) for i in range(1, 61)]
    train_rows, held = split(rows, 0.2, 7)
    assert {r.row["text"] for r in held}.isdisjoint({r.row["text"] for r in train_rows})  # equal rows stay together
    again = split(list(reversed(rows)), 0.2, 7)[1]
    assert again == held and 12 <= len(held) <= 14
    assert split(rows, 0.2, 8)[1] != held
    assert split(rows, 0, 7) == (rows, []) and split(rows[:1], 0.5, 7) == (rows[:1], [])


def test_a_torn_checkpoint_is_passed_over(data_dir: Path, tiny_model: Path) -> None:
    run(order(put_model(tiny_model), put_dataset(chat_rows())), data_dir)
    runs = data_dir / "runs" / "job"
    newest = checkpoint.newest(runs)
    weights = newest / "trainer" / "optimizer.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    older = checkpoint.newest(runs)
    assert older is not None and older != newest
    (older / "manifest.json").unlink()
    assert checkpoint.newest(runs) is None or checkpoint.newest(runs) not in (newest, older)


def test_ranks_that_are_settled_after_the_best_step_are_not_laid_on_its_weights(data_dir: Path, tiny_model: Path) -> None:
    """AdaLoRA goes on pruning after the best checkpoint; its result has that checkpoint's ranks."""
    model = put_model(tiny_model)
    often = {"epochs": 12, "evaluations_per_epoch": 4, "learning_rate": 5e-2, "early_stopping_patience": 2}
    spec = order(model, put_dataset(chat_rows()), "adalora", {"rank": 2, "start_rank": 6}, **often)
    said = run(spec, data_dir)
    finished, saved = said[-1], {e.step: e.path for e in of(said, events.Saved)}
    assert 0 < finished.best_step < finished.step
    pattern = json.loads((data_dir / finished.path / "adapter_config.json").read_text())["rank_pattern"]
    kept = checkpoint.read_tensors(data_dir / saved[finished.best_step], "extra")
    last = checkpoint.read_tensors(data_dir / saved[finished.step], "extra")
    ranks, later = ({key: int(v.sum()) for key, v in state.items() if key.startswith("rank:")} for state in (kept, last))
    assert ranks != later, "ranks have to change after the best step"
    assert {f"rank:{name}": rank if isinstance(rank, int) else sum(rank) for name, rank in pattern.items()} == ranks
