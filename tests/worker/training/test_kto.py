"""Rated answers: KTO's loss and gradients against plain torch, its KL baseline, whole jobs, and jobs that are killed."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from app import events
from app.errors import BadData
from app.machines.hardware import Machine
from app.objectives.kto import KTOSettings
from app.planning import duration
from app.spec import JobSpec
from tests.tiny import SENTENCES
from tests.worker.orders import WarmTrainer, killed_at_random, order, put_dataset, put_model
from tests.worker.runtime.test_distributed import WarmPair
from tests.worker.training.test_dpo import facts, float64, numbered, plainly, steps_of, weights
from worker.data.batching import BadRow, Row
from worker.data.preference_pairs import PreferencePairs
from worker.data.rated_rows import tokenise_rated
from worker.modeling import packed_attention
from worker.runtime.distributed import ProcessGroup
from worker.train import train
from worker.training.objectives.kto import KTO, Weights, baseline_of, losses_of, named, sums_of

pytestmark = pytest.mark.timeout(240)
PULLING = KTOSettings(desirable_weight=5.0, undesirable_weight=0.2)
"""Good answers pull those of other rows along, so the KL baseline rises above 0."""


def rated_rows(count: int = 24, bad: int = 2) -> list[dict[str, Any]]:
    """Of `bad` + 1 rows one is good, and its answer speaks of instruments; the others count, in different lengths."""
    rows = []
    for i in range(count):
        words, good = SENTENCES[i % 13].split(), i % (bad + 1) == 0
        answer = words[: 3 + i % 5] if good else SENTENCES[13].split()[: 2 + i % 7]
        rows.append({
            "messages": [{"role": "user", "content": f"{i}: " + " ".join(words[: 2 + i % 4])}],
            "answer": [{"role": "assistant", "content": " ".join(answer)}], "good": good,
        })  # fmt: skip
    return rows


def rated_order(model: Path, strategy: str = "lora", settings: dict[str, Any] | None = None, rows: int = 24, **run: Any) -> JobSpec:
    kind = run.pop("preference", KTOSettings())
    spec = order(put_model(model), put_dataset(rated_rows(rows), "rated"), strategy, settings, **run)
    return spec.model_copy(update={"task": "kto", "preference": kind})


# The loss ---------------------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_the_paper() -> None:
    draw, beta, given = random.Random(7), 0.3, Weights(1.2, 3.4)
    policy, reference, unrelated = ([draw.uniform(-40, -1) for _ in range(30)] for _ in range(3))
    good = [draw.random() < 0.4 for _ in range(30)]
    kl = sum(p - q for p, q in zip(unrelated, reference, strict=True)) / 30
    for shift in (kl, -kl):  # one of the two is below 0, where z₀ is 0
        z = max(0.0, shift)
        wanted, told = [], 0
        for p, q, is_good in zip(policy, reference, good, strict=True):
            value = 1 / (1 + math.exp(-beta * (p - q - z) if is_good else -beta * (z - (p - q))))
            wanted.append((given.desirable if is_good else given.undesirable) * (1 - value))
            told += value > 0.5
        ratios = torch.tensor(policy, dtype=torch.float64) - torch.tensor(reference, dtype=torch.float64)
        baseline = baseline_of(torch.full((30,), shift, dtype=torch.float64))
        losses, margins = losses_of(ratios, baseline, torch.tensor(good), beta, given)
        torch.testing.assert_close(losses, torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=1e-12)
        found = named(sums_of(beta * ratios, margins, torch.tensor(good), baseline))
        assert found["rating_accuracy"] == pytest.approx(told / 30) and found["kl_baseline"] == pytest.approx(z)
        rewards = [beta * (p - q) for p, q, is_good in zip(policy, reference, good, strict=True) if is_good]
        assert found["good_reward"] == pytest.approx(sum(rewards) / len(rewards))
    assert set(named(sums_of(ratios, margins, torch.ones(30, dtype=torch.bool), baseline))) == {
        "rating_accuracy",
        "kl_baseline",
        "good_reward",
    }


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, (3.0, 1.0)), ({"desirable_weight": 1.5}, (1.5, 0.5)), ({"undesirable_weight": 2.0}, (6.0, 2.0)),
        ({"desirable_weight": 1.0, "undesirable_weight": 1.0}, (1.0, 1.0)),
    ],
)  # fmt: skip
def test_weights_balance_the_two_kinds_unless_they_are_set(settings: dict[str, float], wanted: tuple[float, float]) -> None:
    assert KTOSettings(**settings).weights(10, 30) == pytest.approx(wanted)
    assert KTOSettings().weights(40, 10) == (1.0, 4.0) and KTOSettings().weights(5, 5) == (1.0, 1.0)


# The data ---------------------------------------------------------------------------------------------------------------


def sequence(data: PreferencePairs, number: int) -> tuple[list[int], list[bool]]:
    part = slice(data.sequences.starts[number], data.sequences.starts[number + 1])
    return data.sequences.ids[part].tolist(), data.sequences.trained[part].tolist()


def test_each_prompt_gets_the_answer_of_another_row(tokenizer) -> None:
    rows = numbered(rated_rows(12))
    data = tokenise_rated(tokenizer, rows, "dialogue", 120, [5, 5], seed=3)
    answers = {row["answer"][0]["content"] + "<|im_end|>" for row in rated_rows(12)}
    lengths = []
    for place, (_, row) in enumerate(rows):
        (own, own_learnt), (other, other_learnt) = sequence(data.both, 2 * place), sequence(data.both, 2 * place + 1)
        prompt = own_learnt.index(True)
        assert own[:prompt] == other[:prompt] and not any(other_learnt[:prompt]) and own[:2] == [5, 5]
        texts = [tokenizer.decode([i for i, has in zip(*one, strict=True) if has]) for one in ((own, own_learnt), (other, other_learnt))]
        assert texts[0] == row["answer"][0]["content"] + "<|im_end|>" and texts[1] in answers - {texts[0]}
        lengths.append(len(own))
    assert (
        data.own().lengths == lengths and data.own().lines == list(range(1, 13)) and data.good.tolist() == [i % 3 == 0 for i in range(12)]
    )
    again, other = (tokenise_rated(tokenizer, rows, "dialogue", 120, [5, 5], seed=seed) for seed in (3, 4))
    assert again.both.sequences.ids.tolist() == data.both.sequences.ids.tolist() != other.both.sequences.ids.tolist()
    assert (
        data.both.without_lead().sequences.ids.tolist()
        == tokenise_rated(tokenizer, rows, "dialogue", 118, seed=3).both.sequences.ids.tolist()
    )


def test_rows_without_an_answer_to_learn_or_to_compare_with(data_dir: Path, tiny_model: Path, tokenizer) -> None:
    rows = rated_rows(4)
    long = {**rows[1], "messages": [{"role": "user", "content": "word " * 200}]}
    data = tokenise_rated(tokenizer, numbered([rows[0], long, rows[2]]), "dialogue", 90, seed=1)
    assert data.both.pairs.lines == [1, 3] and data.both.pairs.skipped == [2]
    with pytest.raises(BadRow) as caught:
        tokenise_rated(tokenizer, [Row(4, {"messages": rows[0]["messages"]})], "dialogue", 90, seed=1)
    assert caught.value.line == 4
    same = [{**row, "answer": rows[0]["answer"]} for row in rows]
    with pytest.raises(BadData, match="No other row has an answer that could stand after the prompt of line 1"):
        tokenise_rated(tokenizer, numbered(same), "dialogue", 90, seed=1)
    one = tokenise_rated(tokenizer, numbered(rows[:1]), "dialogue", 90, seed=1, more=numbered(rows))
    assert len(one) == 1, "a single validation row is compared with the answer of a training row"
    assert len(tokenise_rated(tokenizer, [], "dialogue", 90, seed=1)) == 0
    spec = rated_order(tiny_model)
    for good in (True, False):
        data_of_one = put_dataset([{**row, "good": good} for row in rated_rows(6)], "rated")
        with pytest.raises(BadData, match=f"All 6 training answers are rated {'good' if good else 'bad'}"):
            KTO(
                spec.model_copy(update={"dataset": data_of_one, "run": spec.run.model_copy(update={"validation_fraction": 0.0})}), tokenizer
            )


def test_a_packed_step_and_its_gradient_are_those_of_plain_torch(data_dir: Path, tiny_model: Path, tokenizer) -> None:
    lesson = KTO(rated_order(tiny_model, validation_fraction=0, preference=KTOSettings(beta=0.3, undesirable_weight=0.7)), tokenizer)
    packed = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation=packed_attention.NAME, dtype=torch.float64)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="sdpa", dtype=torch.float64)
    packs, engine = [[[3, 0, 4], [7]], [[9, 1, 2]]], float64(threads=2)  # two packs, the first in two parts
    rows = [row for pack in packs for part in pack for row in part]
    alone = torch.stack([plainly(plain, lesson.pairs["train"], row) for row in rows])
    for lower in (2.0, -2.0):  # the policy above the reference, and below it, where z₀ is 0
        offsets = torch.randn(len(lesson.train), 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        reference = torch.zeros(len(lesson.train), 2, dtype=torch.float64)
        reference[rows] = alone.detach() - lower + offsets[rows]
        lesson.reference = {"train": reference}
        batches = [[lesson.batch(part, engine) for part in pack] for pack in packs]
        lesson.before_step(packed, batches, len(rows), engine, ProcessGroup())
        passed = [lesson.loss(packed, part, engine) for pack in batches for part in pack]
        packed.zero_grad()
        sum(one.loss for one in passed).backward()

        ratios = alone - reference[rows]
        z = float(ratios[:, 1].mean().clamp(min=0))
        assert (z > 0.5) == (lower > 0) and float(lesson.baseline) == pytest.approx(z, abs=1e-5)
        good = torch.from_numpy(lesson.good["train"][rows])
        lambdas = torch.where(good, lesson.weights.desirable, lesson.weights.undesirable)
        value = torch.where(good, torch.sigmoid(0.3 * (ratios[:, 0] - z)), torch.sigmoid(0.3 * (z - ratios[:, 0])))
        wanted = (lambdas * (1 - value)).sum()
        assert float(sum(one.loss for one in passed).detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
        assert sum(one.losses for one in passed) == sum(lesson.pairs["train"].answer_tokens(2 * row) for row in rows)
        plain.zero_grad()
        wanted.backward(retain_graph=True)
        for (name, ours), theirs in zip(packed.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")
        assert max(float(p.grad.abs().max()) for p in plain.parameters()) > 1e-3


# Jobs -------------------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["lora", "full"])
def test_good_answers_become_likelier_and_bad_ones_less_likely(data_dir: Path, tiny_model: Path, strategy: str) -> None:
    rate = {"full": 1e-3}.get(strategy, 1e-2)
    spec = rated_order(
        tiny_model,
        strategy,
        rows=36,
        epochs=6,
        learning_rate=rate,
        samples=2,
        sample_tokens=8,
        max_tokens_per_step=256,
        validation_fraction=0.25,
    )
    said = list(train(spec, data_dir / "runs" / strategy / "a1"))
    steps, judged = steps_of(said), [e for e in said if isinstance(e, events.Evaluated)]
    assert isinstance(said[-1], events.Finished) and said[-1].kind == "dialogue"
    first = steps[0].metrics  # the model is the one that it is measured from
    assert first["rating_accuracy"] == 0.5 and first["kl_baseline"] == pytest.approx(0, abs=1e-4)
    assert judged[-1].metrics["rating_accuracy"] > 0.9 and judged[-1].loss < judged[0].loss - 0.1
    assert judged[-1].metrics["good_reward"] > judged[-1].metrics["bad_reward"] + 0.5
    contest = said[-1].evaluation["contest"]
    assert contest["metric"] == "rating_accuracy" and contest["base"]["score"] == 0.5 and contest["base"]["tuned"] > 0.9
    good = {row["messages"][0]["content"]: row["good"] for row in rated_rows(36)}
    samples = next(e for e in said if isinstance(e, events.Sampled)).samples
    assert samples and all(any(prompt in sample.prompt for prompt, rated in good.items() if rated) for sample in samples)
    listed = [*said[-1].evaluation["worst"], *said[-1].evaluation["best"]]
    assert all(row["reference"].startswith("(rated bad) ") != rated_rows(36)[row["line"] - 1]["good"] for row in listed if row["reference"])
    ledger = json.loads((data_dir / "runs" / strategy / "a1" / "ledger.json").read_text())
    assert sorted(ledger["line"]) == list(range(1, 37)) and sum(ledger["after"]) < sum(ledger["before"]) - 0.1 * 36


@pytest.mark.long
@pytest.mark.parametrize(("strategy", "settings"), [("lora", {"dropout": 0.2}), pytest.param("full", {}, marks=pytest.mark.fault)])
def test_killed_at_random_moments(data_dir: Path, tiny_model: Path, strategy: str, settings: dict[str, Any]) -> None:
    run = {"micro_batches": 2, "evaluations_per_epoch": 3, "epochs": 3, "max_tokens_per_step": 240, "preference": PULLING}
    spec = rated_order(tiny_model, strategy, settings, **run)
    whole, code = WarmTrainer(spec, "whole", 1).run()
    assert code == 0 and isinstance(whole[-1], events.Finished)
    said, last = killed_at_random(spec, 6, 3, 7)
    assert facts([*said, *last]) == facts(whole)
    assert weights(last[-1]) == weights(whole[-1])
    assert len(list((data_dir / "runs" / "killed").glob("a*/reference"))) == 1, "the reference is scored once for all attempts"


@pytest.mark.long
def test_two_processes_have_one_baseline(data_dir: Path, tiny_model: Path) -> None:
    """Each reads the unrelated answers of its own packs, and z₀ is the mean over both."""
    spec = rated_order(tiny_model, micro_batches=2, epochs=3, learning_rate=1e-2, max_tokens_per_step=400, preference=PULLING)
    alone = steps_of(list(train(spec, data_dir / "runs" / "alone" / "a1")))
    pair = WarmPair(spec, "pair")
    both = steps_of(list(pair))
    assert pair.wait() == [0, 0] and len(both) == len(alone) > 3
    for one, two in zip(alone, both, strict=True):
        assert two.loss == pytest.approx(one.loss, abs=1e-4)
        assert two.metrics["kl_baseline"] == pytest.approx(one.metrics["kl_baseline"], abs=1e-3)
    assert any(step.metrics["kl_baseline"] > 0.01 for step in alone)


def test_the_estimate_counts_what_is_read_beside(data_dir: Path, tiny_model: Path) -> None:
    """Against the same rows trained as chats: at each step a pass of the unrelated answers more, and before it two of the base."""

    class Counted:
        rows, characters, tokens, trained_tokens, longest, labels = 1000, 400_000, 100_000, 50_000, 200, None

    spec = rated_order(tiny_model, learning_rate=1e-3)
    chats = spec.model_copy(update={"task": "generation", "preference": None})
    machine = Machine(cores=2, memory_bytes=2**34)
    course, shape = duration.course_of(spec, Counted()), spec.model.shape
    forward = duration.forward_operations(shape, course.trained_share)
    more = duration.step_seconds(spec, course, 1e9) - duration.step_seconds(chats, course, 1e9)
    assert more == pytest.approx(course.tokens * forward / 1e9)
    assert duration.beside_seconds(spec, course, 1e9) >= 2 * (course.train + course.held_out) * forward / 1e9
    assert duration.estimate(spec, Counted(), machine).memory_bytes == duration.estimate(chats, Counted(), machine).memory_bytes
