"""Reinforcement: what is drawn, its advantages and losses against plain arithmetic, whole jobs, and jobs that are killed."""

from __future__ import annotations

import itertools
import json
import math
import random
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from app import events
from app.errors import BadData
from app.objectives.reinforcement import VARIANTS, ReinforcementSettings
from app.spec import JobSpec
from app.strategies import STRATEGIES
from app.strategies._peft import PeftStrategy
from tests.worker.orders import WarmTrainer, chat_rows, order, put_dataset, put_model
from tests.worker.training.test_resume import weights
from tests.worker.training.test_train import of, run
from worker.modeling import packed_attention
from worker.modeling.loading import load_tokenizer
from worker.runtime.device import Compute
from worker.runtime.progress import drained
from worker.scoring import sampler
from worker.scoring.sampler import DrawOrder, drawing
from worker.training import rollouts as rolling
from worker.training.objectives.reinforcement import policy_losses
from worker.training.reward_check import judged
from worker.training.rollouts import Rollouts, advantages, joined, only

pytestmark = pytest.mark.timeout(240)
CPU = Compute(torch.device("cpu"), "cpu", "fp32", torch.float32, 1)
VOWELS = {
    "type": "python",
    "name": "vowels",
    "source": "def grade(sample, item):\n    t = sample['output_text']\n    return sum([1 for c in t if c in 'aeiou']) / (1 + len(t))",
}
SAME = {"type": "python", "name": "same", "source": "def grade(sample, item):\n    return 0.0"}
RAISES = {"type": "python", "name": "raises", "source": "def grade(sample, item):\n    return 1 / 0"}


def settings(**given: Any) -> ReinforcementSettings:
    return ReinforcementSettings(
        **{"grader": VOWELS, "group_size": 4, "prompts_per_step": 4, "answer_tokens": 12, "check_prompts": 0} | given
    )


def drawn_order(model: Path, strategy: str = "lora", own: dict[str, Any] | None = None, **more: Any) -> JobSpec:
    given = {"max_steps": 4, "evaluations_per_epoch": 0, "eval_steps": 2, "validation_fraction": 0.3, "max_tokens_per_step": 256, **more}
    spec = order(put_model(model), put_dataset(chat_rows(24)), strategy, **given)
    return spec.model_copy(update={"task": "reinforcement", "preference": settings(**(own or {}))})


# What is drawn ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tiny_model: Path) -> tuple[torch.nn.Module, Any]:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation=packed_attention.NAME).eval()
    return model, load_tokenizer(put_model(tiny_model))


def test_answers_have_the_log_probabilities_that_the_model_gives(data_dir: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer slots than answers, so that slots are used again; every token against a plain pass over the whole text."""
    model, tokenizer = tiny
    prompts = [tokenizer(text).input_ids for text in ("The luthier bends", "What wood is the belly of a violin", "Yes.", "A", "How long")]
    monkeypatch.setattr(sampler, "AT_ONCE", 6)
    stops = [tokenizer.eos_token_id]
    drawn = drained(drawing(model, tokenizer, DrawOrder(prompts, 3, 10, frozenset(stops), 7), CPU))
    assert [len(answers) for answers in drawn] == [3] * 5 and model.config._attn_implementation == packed_attention.NAME
    model.set_attn_implementation("eager")
    for prompt, answers in zip(prompts, drawn, strict=True):
        assert len({tuple(answer.ids) for answer in answers}) > 1, "each has numbers of its own"
        for answer in answers:
            assert answer.ended == (answer.ids[-1] in stops) and (answer.ended or len(answer.ids) == 10)
            with torch.no_grad():
                logs = model(torch.tensor([[*prompt, *answer.ids]])).logits[0].log_softmax(-1)
            plain = [-float(logs[len(prompt) + i - 1, token]) for i, token in enumerate(answer.ids)]
            np.testing.assert_allclose(answer.nats, plain, atol=2e-4)


def test_the_same_seed_draws_the_same_answers_whatever_stands_beside_them(
    data_dir: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny
    prompts = [tokenizer(text).input_ids for text in ("The luthier bends", "What wood is")]

    def ids(seed: int) -> list[list[list[int]]]:
        return [
            [answer.ids for answer in answers]
            for answers in drained(drawing(model, tokenizer, DrawOrder(prompts, 4, 8, frozenset({0}), seed), CPU))
        ]

    first = ids(1)
    monkeypatch.setattr(sampler, "AT_ONCE", 4)
    assert ids(1) == first != ids(2)


def test_tokens_are_drawn_as_often_as_they_are_likely(data_dir: Path, tiny: Any) -> None:
    """First tokens of many answers against the distribution: Pearson's chi-squared over the likeliest ones."""
    model, tokenizer = tiny
    prompt, count = tokenizer("The luthier").input_ids, 1500
    with torch.no_grad():
        p = model(torch.tensor([prompt]), attention_mask=None).logits[0, -1].softmax(-1)
    (answers,) = drained(drawing(model, tokenizer, DrawOrder([prompt], count, 1, frozenset(), 3), CPU))
    seen = torch.bincount(torch.tensor([answer.ids[0] for answer in answers]), minlength=len(p)).double()
    top = p.topk(20)
    expected = torch.cat([top.values.double(), (1 - top.values.double().sum())[None]]) * count
    found = torch.cat([seen[top.indices], (count - seen[top.indices].sum())[None]])
    assert float(((found - expected) ** 2 / expected).sum()) < 45.3, "of 20 degrees of freedom: one in a thousand is above"


# Advantages and losses --------------------------------------------------------------------------------------------------


def test_advantages() -> None:
    rewards = [1.0, 0.0, None, 0.5]
    known = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)
    grpo = ((known - known.mean()) / (known.std() + 1e-4)).tolist()
    assert advantages(rewards, VARIANTS["grpo"]) == pytest.approx([grpo[0], grpo[1], 0.0, grpo[2]])
    assert advantages(rewards, VARIANTS["dr_grpo"]) == pytest.approx([0.5, -0.5, 0.0, 0.0])
    assert advantages(rewards, VARIANTS["rloo"]) == pytest.approx([1 - 0.25, 0 - 0.75, 0.0, 0.5 - 0.5])
    for name in VARIANTS:
        assert advantages([0.3] * 4, VARIANTS[name]) == pytest.approx([0.0] * 4) and advantages([1.0, None], VARIANTS[name]) == [0.0, 0.0]


@pytest.mark.parametrize("kl", [0.0, 0.3])
@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_losses_and_gradients_are_those_of_the_papers(variant: str, kl: float) -> None:
    """Each answer by itself, from the equations, in float64; ratios far enough from 1 to be clipped on both sides."""
    draw = torch.Generator().manual_seed(5)
    counts, limit = [3, 1, 5, 2], 8.0
    new = (-torch.rand(11, generator=draw, dtype=torch.float64)).requires_grad_()
    old, base = (new.detach() + 0.5 * torch.randn(11, generator=draw, dtype=torch.float64) for _ in range(2))
    advantage = torch.tensor([1.2, -0.7, 0.4, -1.5], dtype=torch.float64)
    loss = settings(variant=variant, clip_low=0.2, clip_high=0.3).loss
    found = policy_losses(new, old, advantage, counts, loss, limit, base, kl)
    wanted, clipped = [], 0.0
    for a, n, o, b in zip(advantage, new.split(counts), old.split(counts), base.split(counts), strict=True):
        k3 = (b - n).exp() - (b - n) - 1
        if variant == "rloo":
            ratio = (n.sum() - o.sum()).exp()
            wanted.append(-torch.min(ratio * a, ratio.clamp(0.8, 1.3) * a) + kl * k3.sum())
            clipped += len(n) * float((ratio < 0.8 and a < 0) or (ratio > 1.3 and a > 0))
            continue
        ratio = (n - o).exp() if variant != "gspo" else (n - o).mean().exp().expand(len(n))
        each = -torch.min(ratio * a, ratio.clamp(0.8, 1.3) * a) + kl * k3
        wanted.append(each.mean() if variant in ("grpo", "gspo") else each.sum() / limit)
        clipped += float((((ratio < 0.8) & (a < 0)) | ((ratio > 1.3) & (a > 0))).sum())
    torch.testing.assert_close(found.losses, torch.stack(wanted))
    (gradient,), (expected,) = (torch.autograd.grad(x.sum(), new, retain_graph=True) for x in (found.losses, torch.stack(wanted)))
    torch.testing.assert_close(gradient, expected)
    assert float(found.sums[1]) == pytest.approx(clipped) and float(found.sums[4]) == 11


def rollouts(rewards: list[float | None], group: int = 2, ended: bool = True) -> Rollouts:
    from worker.data.batching import Tokenised

    count = len(rewards)
    data = Tokenised(
        np.arange(3 * count, dtype=np.int32), np.tile([False, True, True], count), np.arange(count + 1) * 3, list(range(count)), 0, []
    )
    return Rollouts(
        data, np.arange(2 * count, dtype=np.float32), np.arange(count, dtype=np.float32), rewards, [i // group for i in range(count)],
        [ended] * count, [f"a{i}" for i in range(count)], [],
    )  # fmt: skip


def test_prompts_that_teach_nothing_are_replaced() -> None:
    one, other = rollouts([1.0, 1.0, 0.0, 1.0]), rollouts([0.0, 1.0])
    assert one.spread() == [False, True] and joined(one, other).spread() == [False, True, True]
    kept = only(joined(one, other), [2, 1])
    assert kept.rewards == [0.0, 1.0, 0.0, 1.0] and kept.groups == [1, 1, 0, 0] and kept.spread() == [True, True]
    assert kept.nats.tolist() == [4, 5, 6, 7, 0, 1, 2, 3] and kept.advantages.tolist() == [2, 3, 0, 1]
    assert kept.data.ids.tolist() == [*range(6, 12), *range(6)]


@pytest.mark.parametrize(
    ("given", "references", "ended", "teaches", "words"),
    [
        ([0.0, 1.0] * 8, [1.0] * 8, True, True, ""),
        ([0.0] * 16, [1.0] * 8, True, False, "none is right"),
        ([1.0] * 16, [1.0] * 8, True, False, "all are right"),
        ([1.0] * 16, [1.0] * 8, False, False, "all are right"),
        ([0.5] * 16, [0.5] * 8, False, False, "answers have it too"),
        ([0.0] * 16, [0.0] * 8, True, False, "dataset's own answers get 0.00"),
        ([0.0] * 16, [1.0] * 8, False, False, "cut by the limit"),
        ([0.0, 1.0] * 8, [0.1] * 8, True, True, "measures what is meant"),
        ([0.0, 1.0] * 8, [1.0] * 8, False, True, "raise answer_tokens"),
    ],
)
def test_the_check_says_what_cannot_teach(given: list[float], references: list[float], ended: bool, teaches: bool, words: str) -> None:
    found = judged(rollouts(given, ended=ended), references, 0.0, 1.0)  # type: ignore[arg-type]
    assert found.teaches is teaches and words in found.why and bool(found.hint) is not teaches
    assert found.prompts == 8 and found.answers == 16 and found.best == float(max(given))


# Jobs -------------------------------------------------------------------------------------------------------------------


def figures(said: list[events.TrainerEvent]) -> list[Any]:
    return [(e.step, repr(e.loss), repr(e.grad_norm), sorted(e.metrics.items())) for e in of(said, events.Step)]


def test_a_job_raises_its_reward(data_dir: Path, tiny_model: Path) -> None:
    said = run(
        drawn_order(
            tiny_model, "full", {"group_size": 8, "check_prompts": 4}, max_steps=16, eval_steps=8, epochs=30, learning_rate=1e-2, samples=2
        ),
        data_dir,
    )
    steps, scored = of(said, events.Step), of(said, events.Evaluated)
    assert isinstance(said[-1], events.Finished) and len(steps) == 16
    first, last = (sum(step.metrics["reward"] for step in some) / 4 for some in (steps[:4], steps[-4:]))
    assert last > first + 0.1 and all(step.metrics["reward"] > 0.1 for step in steps), (first, last)
    assert all(step.metrics["ratio_std"] < 1e-3 for step in steps), "the sampler and the trainer agree"
    held_out = [e.metrics["reward"] for e in scored]
    assert [e.loss for e in scored] == [pytest.approx(1 - reward) for reward in held_out] and held_out[-1] > held_out[0], held_out
    shown = of(said, events.Sampled)
    assert len(shown) == 3 and all(len(one.samples) == 2 and one.samples[0].score is not None for one in shown)
    assert all(s.score == pytest.approx(sum(c in "aeiou" for c in s.answer) / (1 + len(s.answer))) for s in shown[-1].samples)
    contest = said[-1].evaluation["contest"]
    assert contest["metric"] == "reward" and contest["base"]["tuned"] > contest["base"]["score"]
    assert any("Before training, 32 answers to 4 prompts" in e.message for e in of(said, events.Log))
    assert of(said, events.Started)[0].details["reward_check"]["teaches"] is True


@pytest.mark.long
@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_every_variant_trains(data_dir: Path, tiny_model: Path, variant: str) -> None:
    said = run(drawn_order(tiny_model, own={"variant": variant, "kl": 0.1}, max_steps=2), data_dir)
    steps = of(said, events.Step)
    assert isinstance(said[-1], events.Finished) and steps[0].metrics["kl"] == pytest.approx(0, abs=1e-6) and steps[1].metrics["kl"] > 0
    assert all(math.isfinite(step.loss) and step.grad_norm > 0 for step in steps)


ALWAYS = ("lora", "full", "prompt_tuning", "prefix_tuning", "bottleneck_adapter", "adalora")
"""One of each kind; the others are tried in the long runs. The small model has no biases for BitFit."""
ABLE = [
    pytest.param(name, marks=[] if name in ALWAYS else [pytest.mark.fault])
    for name, cls in STRATEGIES.items()
    if "generation" in cls.tasks and cls.recipe == "gradient" and cls.base_bits is None and name != "bitfit"
]


@pytest.mark.long
@pytest.mark.parametrize("strategy", ABLE)
def test_every_strategy_draws_with_the_weights_that_it_trains(data_dir: Path, tiny_model: Path, strategy: str) -> None:
    """Where the sampler read other weights than the trainer, the ratio of the probabilities would not be 1."""
    own = {"dropout": 0.0} if "dropout" in STRATEGIES[strategy].model_fields else {}
    spec = drawn_order(tiny_model, strategy, max_steps=3, learning_rate=2e-2)
    spec = spec.model_copy(update={"strategy": STRATEGIES[strategy](**own)})
    steps = of(run(spec, data_dir), events.Step)
    assert all(0 <= step.metrics["ratio_std"] < 2e-3 and step.metrics["entropy"] > 0 for step in steps), [step.metrics for step in steps]


PEFT = [name for name, cls in STRATEGIES.items() if issubclass(cls, PeftStrategy) and cls.base_bits is None]


@pytest.mark.long
@pytest.mark.parametrize("strategy", [pytest.param(n, marks=[] if n in ("lora", "pissa", "ia3") else [pytest.mark.fault]) for n in PEFT])
def test_the_penalty_compares_with_the_base(data_dir: Path, tiny_model: Path, strategy: str) -> None:
    """Before the first step the adapter is the base, whose log-probabilities with the adapter off are those of the untuned model."""
    own = {"dropout": 0.0} if "dropout" in STRATEGIES[strategy].model_fields else {}
    spec = drawn_order(tiny_model, strategy, {"kl": 0.1}, max_steps=3, learning_rate=2e-2)
    spec = spec.model_copy(update={"strategy": STRATEGIES[strategy](**own)})
    kls = [step.metrics["kl"] for step in of(run(spec, data_dir), events.Step)]
    assert kls[0] == pytest.approx(0, abs=1e-6) and min(kls[1:]) > 1e-7, kls


def test_a_reward_that_teaches_nothing_is_not_begun(data_dir: Path, tiny_model: Path) -> None:
    with pytest.raises(BadData, match="Not worth starting: the answers to 100% of the prompts have the same reward"):
        run(drawn_order(tiny_model, own={"grader": SAME, "check_prompts": 4}), data_dir)
    said = run(drawn_order(tiny_model, own={"grader": SAME, "check_prompts": 4, "despite_check": True}, max_steps=1), data_dir, "despite")
    assert isinstance(said[-1], events.Finished) and of(said, events.Step)[0].metrics["zero_variance_groups"] == 1


@pytest.mark.long
def test_a_check_that_is_open_asks_further_prompts(data_dir: Path, tiny_model: Path) -> None:
    """One answer in twenty is right: where none of the first is, none may be missing among more."""
    source = "def grade(sample, item):\n    t = sample['output_text']\n    return 1.0 if t == item['reference'] or sum(map(ord, t)) % 20 == 0 else 0.0"
    rare = {"type": "python", "name": "rare", "source": source}
    found = []
    for seed in range(8):
        own = {"grader": rare, "check_prompts": 3, "despite_check": True}
        said = run(drawn_order(tiny_model, own=own, max_steps=1, seed=seed, validation_fraction=0.2), data_dir, f"open-{seed}")
        check = of(said, events.Started)[0].details["reward_check"]
        assert check["prompts"] == (3 if check["spread"] and check["prompts"] == 3 else 12) and check["references"] == 1
        found.append((check["prompts"], check["teaches"]))
    assert (12, True) in found and any(prompts == 3 for prompts, _ in found), found
    said = run(drawn_order(tiny_model, own={"grader": SAME, "check_prompts": 3, "despite_check": True}, max_steps=1), data_dir, "same")
    assert of(said, events.Started)[0].details["reward_check"]["prompts"] == 3, "where the grader tells nothing apart no more are asked"


def test_a_grader_that_fails_ends_the_job_with_its_reason(data_dir: Path, tiny_model: Path) -> None:
    with pytest.raises(BadData, match="The grader raises could not grade 16 of 16 answers"):
        run(drawn_order(tiny_model, own={"grader": RAISES}), data_dir)


def test_an_answer_without_a_grade_is_no_zero(data_dir: Path, tiny_model: Path) -> None:
    """It is left out of the mean and of the paired difference alike."""
    some = {"type": "python", "name": "some", "source": "def grade(sample, item):\n    return 1.0 if len(item['prompt']) % 3 else 1 / 0"}
    said = run(drawn_order(tiny_model, own={"grader": some}, max_steps=1, validation_fraction=0.5), data_dir)
    assert [e.metrics["reward"] for e in of(said, events.Evaluated)] == [1.0, 1.0]
    assert any("have no grade" in event.message for event in of(said, events.Log))
    contest = said[-1].evaluation["contest"]["base"]
    assert contest["score"] == contest["tuned"] == 1.0 and 0 < contest["rows"] < of(said, events.Started)[0].validation_rows


def test_rows_without_room_for_an_answer_are_said(data_dir: Path, tiny_model: Path) -> None:
    with pytest.raises(BadData, match=r"None of the 1\d rows has a prompt that leaves room for an answer of 400 tokens"):
        run(drawn_order(tiny_model, own={"answer_tokens": 400}, max_length=404), data_dir)


def test_several_updates_learn_from_one_batch_of_answers(data_dir: Path, tiny_model: Path) -> None:
    own = {"updates_per_batch": 3, "clip_low": 0.02, "clip_high": 0.02}
    said = run(drawn_order(tiny_model, "full", own, max_steps=8, epochs=30, learning_rate=5e-3), data_dir)
    steps = of(said, events.Step)
    drawn = [(step.metrics["reward"], step.metrics["answer_length"], step.metrics["entropy"]) for step in steps]
    assert len(set(drawn)) == 3 and all(drawn[at] == drawn[at - at % 3] for at in range(8)), drawn
    spread, clipped = ([step.metrics[name] for step in steps] for name in ("ratio_std", "clip_fraction"))
    assert all(spread[at] < 1e-3 and clipped[at] == 0 for at in (0, 3, 6)), "the weights are those that drew"
    assert all(spread[at] > 5e-3 for at in (1, 2, 4, 5, 7)) and max(clipped) > 0.05, (spread, clipped)
    assert steps[-1].epoch == pytest.approx(8 / (3 * math.ceil(of(said, events.Started)[0].train_rows / 4)), abs=1e-4)


@pytest.mark.long
def test_padded_models_know_the_probabilities_of_earlier_weights(data_dir: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sampler that does not tell them: they are read with the weights that drew, before the first update."""
    own, more = {"updates_per_batch": 2, "clip_low": 0.02, "clip_high": 0.02}, {"max_steps": 4, "learning_rate": 5e-3, "epochs": 9}
    told = figures(run(drawn_order(tiny_model, "full", own, **more), data_dir))
    packed = rolling._packed

    def silent(drawn: rolling.DrawnTexts, *rest: Any) -> Rollouts:
        return packed(drawn._replace(answers=[one._replace(nats=[]) for one in drawn.answers]), *rest)

    monkeypatch.setattr(rolling, "_packed", silent)
    untold = figures(run(drawn_order(tiny_model, "full", own, **more), data_dir, "untold"))
    for (step, loss, norm, metrics), (_, loss_, norm_, metrics_) in zip(told, untold, strict=True):
        one, other = dict(metrics), dict(metrics_)
        assert float(loss) == pytest.approx(float(loss_), abs=1e-4) and float(norm) == pytest.approx(float(norm_), rel=1e-2), step
        assert one["ratio_std"] == pytest.approx(other["ratio_std"], rel=1e-2, abs=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("updates", [1, 3])
def test_a_resumed_job_draws_what_it_would_have_drawn(data_dir: Path, tiny_model: Path, updates: int) -> None:
    """To the bit: killed in the middle of a step, and gone on from the checkpoint before, which may stand between two updates on one batch of
    answers."""
    own = {"variant": "dapo", "kl": 0.05, "check_prompts": 3, "updates_per_batch": updates}
    spec = drawn_order(tiny_model, own=own, max_steps=6, save_steps=2)
    whole, code = WarmTrainer(spec, "whole", 1).run()
    assert code == 0 and len(of(whole, events.Step)) == 6
    trainer = WarmTrainer(spec, "killed", 1)
    said = list(itertools.takewhile(lambda event: not (isinstance(event, events.Step) and event.step == 5), trainer))
    trainer.process.kill()
    trainer.wait()
    again, code = WarmTrainer(spec, "killed", 2).run()
    began = of(again, events.Started)[0]
    assert code == 0 and began.resumed_from == 4 and began.exact and not any("Before training" in e.message for e in of(again, events.Log))
    assert figures(said)[:4] + figures(again) == figures(whole)
    one, other = (json.loads(json.dumps(found[-1].evaluation)) for found in (whole, again))  # type: ignore[union-attr]
    assert one == other and weights(again[-1]) == weights(whole[-1])


@pytest.mark.fault
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [1])
def test_killed_at_any_moment(data_dir: Path, tiny_model: Path, seed: int) -> None:
    """Killed 25 times by the clock: while answers are drawn or graded, in updates, evaluations and saves. Nothing is lost and nothing comes twice."""
    own = {"kl": 0.05, "updates_per_batch": 3, "check_prompts": 3}
    spec = drawn_order(tiny_model, own=own, max_steps=150, epochs=400, save_steps=2, eval_steps=10)
    whole, code = WarmTrainer(spec, "whole", 1).run()
    assert code == 0
    draw, said, kills, attempt = random.Random(seed), list[events.TrainerEvent](), 0, 0
    while kills < 25:
        attempt += 1
        trainer = WarmTrainer(spec, "killed", attempt)
        killer, some = threading.Timer(draw.uniform(0.3, 2.5), trainer.kill), list[events.TrainerEvent]()
        for event in trainer:
            if isinstance(event, events.Started):
                killer.start()
            some.append(event)
        killer.cancel()
        code, kills = trainer.wait(), kills + 1
        said += some
        assert code == -signal.SIGKILL, f"the job ended after {kills} kills: it is too short"
    again, code = WarmTrainer(spec, "killed", attempt + 1).run()
    assert code == 0 and of(again, events.Started)[0].exact and of(again, events.Started)[0].resumed_from
    by_step = {figure[0]: figure for figure in figures(whole)}
    seen = figures([*said, *again])
    assert all(by_step[figure[0]] == figure for figure in seen) and {figure[0] for figure in seen} == set(by_step)
    assert weights(again[-1]) == weights(whole[-1])
