"""What the settings of a run do to the training, each on a whole small job, and what is refused."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from app import events
from app.errors import BadField, DoesNotFit
from app.machines.hardware import Machine
from app.planning import feasibility
from app.shapes import shape_of
from app.spec import JobSpec, RunSettings
from app.strategies import STRATEGIES
from app.strategies.lora import Lora
from tests.worker.orders import chat_rows, order, put_dataset, put_model
from worker import train
from worker.data.batching import make_batch
from worker.data.chat_template import render_row
from worker.data.inspection import _look
from worker.data.packing import plan
from worker.modeling.loading import load_tokenizer
from worker.runtime import distributed
from worker.training.neftune import add_noise
from worker.training.objectives import objective_of


def run(spec: JobSpec, data_dir: Path, job: str = "job") -> list:
    return list(train.train(spec, data_dir / "runs" / job / "a1"))


def in_two(spec: JobSpec, data_dir: Path, at: int) -> list:
    """The same job stopped behind step `at` and resumed, in which it has to say what it would have said without."""
    control, said = train.StopSignals(), []
    for event in train.train(spec, data_dir / "runs" / "halved" / "a1", control=control):
        said.append(event)
        control.stop |= isinstance(event, events.Step) and event.step == at
    assert control.stopped
    rest = list(train.train(spec, data_dir / "runs" / "halved" / "a2"))
    assert of(rest, events.Started)[0].exact
    return [*said, *rest]


def same(one: list, other: list) -> None:
    """Two jobs have the same losses and the same weights."""
    first, second = ([(e.step, e.loss, e.grad_norm) for e in of(said, events.Step)] for said in (one, other))
    assert first == second
    weights = [said[-1].adapter_sha256 or said[-1].revision for said in (one, other)]
    assert weights[0] == weights[1]


def of(said: list, kind: type) -> list:
    return [event for event in said if isinstance(event, kind)]


TEN = {"max_steps": 10, "epochs": 50, "validation_fraction": 0, "learning_rate": 1e-3, "row_losses": False}
"""Ten steps and nothing else."""


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "linear", "warmup_steps": 2}, [0.5, 1, *(1 - i / 8 for i in range(8))]),
        ({"schedule": "wsd", "warmup_steps": 1, "decay_fraction": 0.4}, [1] * 7 + [0.75, 0.5, 0.25]),
        ({"schedule": "wsd", "warmup_fraction": 0, "decay_fraction": 0.2, "min_lr_fraction": 0.5}, [1] * 9 + [0.75]),
        (
            {"schedule": "cosine_with_restarts", "warmup_steps": 0, "num_cycles": 2},
            [0.5 * (1 + math.cos(math.pi * (i % 5) / 5)) for i in range(10)],
        ),
        (
            {"schedule": "cosine", "warmup_fraction": 0.2, "min_lr_fraction": 0.1},
            [0.5, 1, *(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8))],
        ),
    ],
)
def test_a_schedule_moves_the_learning_rate(data_dir: Path, tiny_model: Path, settings: dict, expected: list[float]) -> None:
    steps = of(run(order(put_model(tiny_model), put_dataset(chat_rows()), **TEN, **settings), data_dir), events.Step)
    assert [step.learning_rate for step in steps] == pytest.approx([1e-3 * share for share in expected])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"warmup_steps": 5, "warmup_fraction": 0.1}, "same as warmup_fraction"),
        ({"batch_size": 4, "max_tokens_per_step": 512}, "same as max_tokens_per_step"),
        ({"batch_size": 6, "micro_batches": 4}, "A batch of 6 rows cannot be split over 4"),
        ({"eval_steps": 4, "evaluations_per_epoch": 2}, "same as evaluations_per_epoch"),
        ({"num_cycles": 3}, "for schedule cosine_with_restarts"),
        ({"schedule": "linear", "decay_fraction": 0.2}, "for schedule wsd"),
        ({"schedule": "constant", "min_lr_fraction": 0.2}, "schedule is constant"),
        ({"optimizer": "adafactor", "adam_beta2": 0.9}, "optimizer is adafactor"),
        ({"optimizer": "adafactor", "adam_beta1": 0}, "optimizer is adafactor"),
        ({"optimizer": "lion", "adam_epsilon": 1e-6}, "optimizer is lion"),
    ],
)
def test_a_setting_without_its_use_is_refused(settings: dict, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        RunSettings(**settings)


def test_a_stored_order_is_read_back_as_it_was() -> None:
    """Settings that came later are not written where nobody gave them, so that a job begun before goes on bit for bit."""
    for settings in ({}, {"warmup_steps": 5}, {"schedule": "wsd", "decay_fraction": 0.3}):
        assert RunSettings.model_validate(RunSettings(**settings).model_dump(mode="json")) == RunSettings(**settings)
    assert set(RunSettings().model_dump()) == BEFORE


@pytest.mark.long
@pytest.mark.parametrize(("kind", "strategy"), [("lion", "lora"), ("muon", "full"), ("adafactor", "lora")])
def test_a_job_learns_by_every_optimizer_and_resumes_bit_for_bit(data_dir: Path, tiny_model: Path, kind: str, strategy: str) -> None:
    rate = {"learning_rate": 2e-3 if kind == "lion" else 1e-2}
    spec = order(put_model(tiny_model), put_dataset(chat_rows()), strategy, **{**TEN, **rate}, optimizer=kind, max_tokens_per_step=640)
    whole = run(spec, data_dir)
    losses = [e.loss for e in of(whole, events.Step)]
    assert losses[-1] < losses[0] - 0.05
    same(in_two(spec, data_dir, 4), whole)


def test_lion_has_a_rate_of_its_own_where_nobody_says_one(data_dir: Path, tiny_model: Path) -> None:
    model, data = put_model(tiny_model), put_dataset(chat_rows(3))
    adamw, lion = (order(model, data, learning_rate=None, optimizer=kind).learning_rate for kind in ("adamw", "lion"))
    assert lion == pytest.approx(adamw / 5)


def adapter_of(said: list, data_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(data_dir / said[-1].path / "adapter_model.safetensors")


def test_lora_on_single_modules_with_a_rate_of_its_own_for_b(data_dir: Path, tiny_model: Path) -> None:
    chosen = {"target_modules": ["layers.1.*.q_proj", "down_proj"], "init_lora_weights": "gaussian", "loraplus_lr_ratio": 8, "rank": 16}
    model, one = put_model(tiny_model), {**TEN, "max_steps": 1, "warmup_fraction": 0, "max_grad_norm": 0}
    spec = order(model, put_dataset(chat_rows()), "lora", chosen, **one)
    assert STRATEGIES["lora"].model_validate(spec.strategy.model_dump(mode="json")) == spec.strategy
    said = run(spec, data_dir)
    found = adapter_of(said, data_dir)
    names = {name.removeprefix("base_model.model.model.layers.").removesuffix(".lora_A.weight") for name in found if ".lora_A." in name}
    assert names == {"1.self_attn.q_proj", "0.mlp.down_proj", "1.mlp.down_proj"}
    assert (
        of(said, events.Started)[0].trainable_parameters == spec.strategy.trainable(model.shape) == sum(x.numel() for x in found.values())
    )
    for name, value in found.items():
        if ".lora_B." in name:  # the first step of AdamW is as long as its rate in every number
            assert float(value.abs().median()) == pytest.approx(8e-3, rel=0.02)
        else:
            assert float(value.std()) == pytest.approx(1 / 16, rel=0.15) and float(value.abs().max()) > 1 / 8
    assert spec.strategy.unknown_modules(model.shape) == [] and Lora(target_modules="q_prog, v_proj").unknown_modules(model.shape) == [
        "q_prog"
    ]
    with pytest.raises(ValidationError, match="same as layers"):
        Lora(layers="attention", target_modules="q_proj")


def test_every_name_of_a_module_is_one_of_the_model(network) -> None:
    shape = shape_of(network.config.to_dict())
    there = {name: (m.in_features, m.out_features) for name, m in network.named_modules() if isinstance(m, torch.nn.Linear)}
    assert {name: (x.inputs, x.outputs) for name, x in shape.modules()} == {n: w for n, w in there.items() if n != "lm_head"}


@pytest.mark.long
def test_noise_on_embeddings_is_there_while_training_alone(data_dir: Path, tiny_model: Path) -> None:
    model, data = put_model(tiny_model), put_dataset(chat_rows())
    quick = {**TEN, "validation_fraction": 0.2, "max_tokens_per_step": 320}
    plain, spec = (order(model, data, neftune_noise_alpha=alpha, **quick) for alpha in (None, 50))
    without, noisy = run(plain, data_dir, "plain"), run(spec, data_dir)
    first, second = (of(said, events.Evaluated)[0].loss for said in (without, noisy))
    assert first == second
    assert abs(of(without, events.Step)[0].loss - of(noisy, events.Step)[0].loss) > 1e-3
    same(in_two(spec, data_dir, 4), noisy)


def test_the_noise_of_a_row_is_by_its_length(network) -> None:
    add_noise(network, 5.0)
    ids, places = torch.zeros(1, 25, dtype=torch.long), torch.cat([torch.arange(9), torch.arange(16)])[None]
    clean, seen = network.get_input_embeddings().weight[0], []
    network.model.layers[0].register_forward_pre_hook(lambda _, given: seen.append(given[0][0] - clean))
    network.train()(input_ids=ids, position_ids=places)
    network.eval()(input_ids=ids, position_ids=places)
    for part, length in ((seen[0][:9], 9), (seen[0][9:], 16)):
        most = 5.0 / math.sqrt(length * part.shape[1])
        assert 0.9 * most < float(part.detach().abs().max()) <= most
    assert not seen[1].any()


@pytest.mark.long
def test_a_batch_in_rows_is_so_many_rows_however_it_is_put_together(data_dir: Path, tiny_model: Path) -> None:
    """Four rows at once, in two passes, and as two batches added up: the same rows, losses and gradients."""
    model, data = put_model(tiny_model), put_dataset(chat_rows(24))
    quick = {**TEN, "max_steps": None, "epochs": 1, "max_tokens_per_step": None}
    ways = [{"batch_size": 4}, {"batch_size": 4, "micro_batches": 2}, {"batch_size": 2, "gradient_accumulation_steps": 2}]
    found = []
    for number, way in enumerate(ways):
        said = run(order(model, data, **quick, **way), data_dir, f"way{number}")
        steps = of(said, events.Step)
        assert len(steps) == of(said, events.Started)[0].total_steps == 6 and steps[-1].epoch == 1
        found.append([(e.trained_tokens, e.loss, e.grad_norm) for e in steps])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert one[0] == two[0] and one[1:] == pytest.approx(two[1:], rel=1e-4)
    spec = order(model, data, **quick, **ways[2])
    same(in_two(spec, data_dir, 3), run(spec, data_dir, "whole"))
    assert JobSpec.model_validate_json(spec.model_dump_json()) == spec
    twice = order(model, data, **{**TEN, "max_steps": None, "epochs": 2}, gradient_accumulation_steps=2, max_tokens_per_step=200)
    once = order(model, data, **{**TEN, "max_steps": None, "epochs": 2}, micro_batches=2, max_tokens_per_step=400)
    both = [[(e.trained_tokens, e.loss) for e in of(run(s, data_dir, n), events.Step)] for s, n in ((twice, "twice"), (once, "once"))]
    assert both[0] == both[1], "two batches of 200 tokens are one of 400 in two passes"


def test_processes_share_a_step_evenly_or_say_why_not(data_dir: Path, tiny_model: Path, monkeypatch) -> None:
    monkeypatch.setattr(distributed, "size", lambda: 4)
    model, data = put_model(tiny_model), put_dataset(chat_rows(3))
    rows = distributed.spread(order(model, data, batch_size=6, max_tokens_per_step=None, gradient_accumulation_steps=2)).run
    assert (rows.batch_size, rows.passes, rows.gradient_accumulation_steps, rows.max_tokens_per_step) == (12, 4, 1, None)
    tokens = distributed.spread(order(model, data, max_tokens_per_step=300, gradient_accumulation_steps=3)).run
    assert (tokens.max_tokens_per_step, tokens.passes) == (900, 4)
    uneven = order(model, data, batch_size=6, max_tokens_per_step=None)
    with pytest.raises(DoesNotFit, match="6 rows of a step"):
        distributed.spread(uneven)
    four = Machine(cores=4, memory_bytes=2**34, processes=4)
    with pytest.raises(BadField, match="4 processes share a step"):
        feasibility.refuse_without_gpu(uneven.strategy, uneven.run, "generation", four)


def test_an_order_of_an_older_studio_is_read_under_the_names_of_today(data_dir: Path, tiny_model: Path) -> None:
    spec = order(put_model(tiny_model), put_dataset(chat_rows(3)), micro_batches=4)
    stored = spec.model_dump_json().replace('"micro_batches":4', '"accumulation":4')
    assert JobSpec.model_validate_json(stored) == spec and JobSpec.model_validate(json.loads(stored)) == spec
    assert train.spec_digest(spec) == hashlib.sha256(stored.encode()).hexdigest(), "a job that began under the old name is resumed exactly"
    with pytest.raises(ValidationError):
        RunSettings(accumulation=4)


@pytest.mark.long
def test_evaluations_and_checkpoints_by_steps(data_dir: Path, tiny_model: Path) -> None:
    quick = {**TEN, "max_steps": 200, "validation_fraction": 0.2, "learning_rate": 3e-2, "early_stopping_patience": 2, "eval_steps": 4}
    model, data = put_model(tiny_model), put_dataset(chat_rows())
    spec = order(model, data, "full", **quick, save_steps=3, save_total_limit=1)
    said = run(spec, data_dir)
    finished, bests = said[-1], {e.step for e in of(said, events.Evaluated) if e.best}
    last, best = finished.step, finished.best_step
    assert finished.reason == "early_stopped" and best == max(bests) == last - 8
    assert [e.step for e in of(said, events.Evaluated)] == [*range(0, last + 1, 4)]
    assert {e.step for e in of(said, events.Saved)} == {*range(3, last + 1, 3), *bests}
    kept = {int(path.name.rpartition("-")[2]) for path in (data_dir / "runs/job").glob("a*/checkpoint-*")}
    assert kept == {best, max(e.step for e in of(said, events.Saved))}
    same(in_two(spec, data_dir, 5), said)

    newest = run(order(model, data, "full", **quick, load_best=False), data_dir, "last")
    final = of(newest, events.Saved)[-1]
    ours, theirs = (load_file(data_dir / folder / "model.safetensors") for folder in (newest[-1].path, final.path + "/weights"))
    assert newest[-1].best_step == final.step == last and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert newest[-1].evaluation["tuned"]["loss"] == pytest.approx(of(newest, events.Evaluated)[-1].loss)
    assert newest[-1].evaluation["tuned"]["loss"] > finished.evaluation["tuned"]["loss"]


@pytest.mark.long
def test_the_best_checkpoint_goes_by_the_metric_that_was_asked_for(data_dir: Path, tiny_model: Path) -> None:
    quick = {**TEN, "max_steps": 12, "validation_fraction": 0.3, "max_tokens_per_step": 320, "learning_rate": 0.1, "eval_steps": 1}
    model, data = put_model(tiny_model), put_dataset(chat_rows())
    for metric, key in (("loss", lambda e: e.loss), ("accuracy", lambda e: -e.metrics["token_accuracy"])):
        said = run(order(model, data, **quick, metric_for_best=metric), data_dir, metric)
        assert said[-1].best_step == min((e for e in of(said, events.Evaluated) if e.step), key=key).step


def test_padding_instead_of_packing_gives_the_same_loss(data_dir: Path, tiny_model: Path) -> None:
    model, data = put_model(tiny_model), put_dataset(chat_rows(24))
    quick = {**TEN, "max_steps": None, "epochs": 1, "batch_size": 4, "max_tokens_per_step": None}
    packed, padded = ([*of(run(order(model, data, **quick, packing=p), data_dir, f"packing-{p}"), events.Step)] for p in (True, False))
    for one, two in zip(packed, padded, strict=True):
        assert one.tokens == two.tokens and (one.loss, one.grad_norm) == pytest.approx((two.loss, two.grad_norm), rel=1e-4)
    tokenised = objective_of(order(model, data, **quick), load_tokenizer(model)).train
    rows = sorted(range(len(tokenised)), key=lambda row: tokenised.lengths[row])[:: len(tokenised) - 1]
    shortest, longest = (tokenised.lengths[row] for row in rows)
    batch = make_batch(tokenised, rows, torch.device("cpu"), padded=True)
    assert batch.arguments["sequence_lengths"][:3] == [shortest, longest - shortest, longest] and batch.tokens == shortest + longest
    assert batch.input_ids[0, batch.sources + 1].tolist() == batch.targets.tolist()
    for pack in plan(tokenised.lengths, 200, seed=1, epoch=0, padded=True):
        assert len(pack) == 1 or len(pack) * max(tokenised.lengths[row] for row in pack) <= 200


TALK = [("system", "You are a luthier."), ("user", "What wood is the belly made of?"), ("assistant", "Spruce."), ("user", "And the back?")]


@pytest.mark.parametrize(
    ("train_on", "learned"),
    [
        ("assistant", ["Spruce.<|im_end|>", "Maple.<|im_end|>"]),
        ("last_turn", ["Maple.<|im_end|>"]),
        ("all_turns", ["~system\nYou are a luthier.", "What wood is", "Spruce.", "And the back?", "Maple."]),
    ],
)
def test_the_trainer_and_the_token_view_learn_the_same_turns(data_dir: Path, tiny_model: Path, tokenizer, train_on: str, learned) -> None:
    messages = [{"role": role, "content": text} for role, text in [*TALK, ("assistant", "Maple.")]]
    rows = [{"messages": messages}, *chat_rows(4)]
    spec = order(put_model(tiny_model), put_dataset(rows), train_on=train_on, validation_fraction=0, max_steps=1, max_tokens_per_step=4000)
    data = objective_of(spec, load_tokenizer(spec.model)).train
    first = data.only({1})
    shown = _look(tokenizer, rows[0], {"kind": "dialogue", "cutoff": 1024, "train_on": train_on})["tokens"]
    assert [state for _, state in shown] == first.trained.astype(int).tolist()
    text = "".join(piece if state else "~" for piece, state in shown)
    assert all(part in text for part in learned) and ("What wood" in text) == (train_on == "all_turns")
    assert ("Spruce" in text) == (train_on != "last_turn")
    step = of(run(spec, data_dir), events.Step)[0]
    assert step.trained_tokens == int(data.trained.sum())


def test_a_turn_of_no_weight_is_never_learned(tokenizer) -> None:
    row = {"messages": [{"role": role, "content": text} for role, text in [*TALK, ("assistant", "Maple.")]]}
    row["messages"][2]["weight"] = 0
    ids, trained, _ = render_row(tokenizer, row, "dialogue", 1024, "all_turns")
    kept = tokenizer.decode([token for token, learned in zip(ids, trained, strict=True) if not learned][1:])
    assert kept == "Spruce.<|im_end|>"


BEFORE = {
    "epochs", "learning_rate", "max_tokens_per_step", "max_length", "max_steps", "micro_batches", "schedule", "warmup_fraction", "weight_decay",
    "max_grad_norm", "validation_fraction", "data_fraction", "evaluations_per_epoch", "early_stopping_patience", "samples", "sample_tokens",
    "forgetting", "row_losses", "precision", "optimizer", "gradient_checkpointing", "seed",
}  # fmt: skip
"""The settings that every stored job has."""
