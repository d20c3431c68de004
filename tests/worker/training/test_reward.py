"""A reward model: its loss against plain arithmetic, whole jobs, its use as a grader, and jobs that are killed."""

from __future__ import annotations

import math
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from app import events, graders
from app.errors import BadRequest
from app.graders import GradedSample
from app.inference import judges
from app.inference.judges import ResolvedJudge
from app.inference.protocol import GenerateRequest
from app.kit.token_meter import TokenMeter
from app.objectives.reward import RewardSettings
from app.spec import JobSpec, ModelRef
from app.strategies import STRATEGIES
from tests.card_code import run_card
from tests.worker.orders import WarmTrainer, killed_at_random, put_model
from tests.worker.training.test_classification import tuned_ref
from tests.worker.training.test_dpo import facts, pair_order, pair_rows, weights
from tests.worker.training.test_train import of, run
from worker.inference.reward import reward
from worker.modeling import packed_attention
from worker.modeling.classifier import load_classifier
from worker.modeling.loading import load_tokenizer
from worker.runtime.device import choose
from worker.runtime.progress import drained
from worker.training.objectives.reward import RewardModel, losses_of, scoring

pytestmark = pytest.mark.timeout(240)
ABLE = [n for n, cls in STRATEGIES.items() if "classification" in cls.tasks and cls.recipe == "gradient" and cls.base_bits is None]
ALWAYS = ("lora", "full", "prompt_tuning", "dense_head", "bottleneck_adapter")
"""One of each kind; the others are tried in the long runs."""


def reward_order(model: Path, strategy: str = "lora", settings: dict[str, Any] | None = None, rows: int = 24, **more: Any) -> JobSpec:
    own = more.pop("own", RewardSettings())
    given = {"epochs": 6, "learning_rate": 1e-2, "max_tokens_per_step": 256, **more}
    return pair_order(model, strategy, settings, rows, **given).model_copy(update={"task": "reward", "preference": own})


def result_of(spec: JobSpec, said: list[Any]) -> ModelRef:
    whole = {} if type(spec.strategy).adapter else {"revision": said[-1].revision}
    return tuned_ref(spec, said[-1]).model_copy(update={"kind": "reward", **whole})


def test_the_loss_is_that_of_the_paper() -> None:
    draw = torch.Generator().manual_seed(1)
    rewards = (3 * torch.randn(40, 2, dtype=torch.float64, generator=draw)).requires_grad_()
    wanted = [-math.log(1 / (1 + math.exp(low - high))) + 0.3 * (high + low) ** 2 for high, low in rewards.tolist()]
    losses = losses_of(rewards, 0.3)
    assert losses.tolist() == pytest.approx(wanted, rel=1e-12)
    (gradient,) = torch.autograd.grad(losses.sum(), rewards)
    chosen = [-1 / (1 + math.exp(high - low)) + 0.6 * (high + low) for high, low in rewards.tolist()]
    assert gradient[:, 0].tolist() == pytest.approx(chosen, rel=1e-9)
    assert float(losses_of(torch.tensor([[-9e4, 9e4]]), 0.0)) == pytest.approx(1.8e5)


def test_rewards_in_a_pack_are_those_of_each_answer_alone(data_dir: Path, tiny_model: Path) -> None:
    spec = reward_order(tiny_model)
    lesson, engine = RewardModel(spec, load_tokenizer(spec.model)), choose(spec.run, spec.strategy, {})
    model = lesson.attach(lesson.load(engine)).eval()
    torch.nn.init.normal_(model.head.weight)
    data = lesson.pairs["train"]
    found = drained(scoring(model, data, 200, engine))
    batch = lesson.batch([3, 0, 5], engine)
    passed = lesson.loss(model, batch, engine)
    for pair in (0, 3, 5):
        for side in (0, 1):
            part = slice(data.sequences.starts[2 * pair + side], data.sequences.starts[2 * pair + side + 1])
            ids = torch.from_numpy(data.sequences.ids[part].astype("int64"))[None]
            with torch.no_grad():
                last = model.backbone(input_ids=ids, position_ids=torch.arange(ids.shape[1])[None]).last_hidden_state[0, -1]
                assert float(model.head(last)) == pytest.approx(float(found[pair, side]), abs=1e-4)
    assert float(passed.loss.detach()) == pytest.approx(float(losses_of(found[[3, 0, 5]], 0.01).sum()), abs=1e-4)
    assert passed.losses == 3 and float(found.std()) > 0.1


def test_a_job_learns_and_its_result_is_a_grader(data_dir: Path, tiny_model: Path) -> None:
    spec = reward_order(tiny_model, samples=2, forgetting=True)
    said = run(spec, data_dir)
    (started,), finished = of(said, events.Started), said[-1]
    assert isinstance(finished, events.Finished) and (finished.kind, finished.labels) == ("reward", ["reward"])
    assert started.trainable_parameters == spec.strategy.trainable_parameters(spec.model.shape, task="reward", labels=1)
    found = finished.evaluation
    low, high = found["tuned"]["intervals"]["reward_accuracy"]
    assert (
        low < found["tuned"]["reward_accuracy"] <= high
        and found["tuned"]["reward_accuracy"] > 0.9
        and found["base"]["reward_accuracy"] == 0.5
    )
    assert found["contest"]["base"]["interval"][0] == pytest.approx(low - 0.5) and found["rows"] == started.validation_rows
    assert set(of(said, events.Step)[0].metrics) == {"reward_margin", "reward_accuracy", "chosen_reward", "rejected_reward"}
    shown = of(said, events.Sampled)[-1].samples[0]
    assert "for the chosen answer" in shown.answer and shown.reference

    # The same numbers from the saved model, through what a grader asks.
    ref, rows = result_of(spec, said), pair_rows()
    asked = [[*row["messages"], *row[side]] for row in rows for side in ("chosen", "rejected")]
    told = np.asarray(reward(ref, asked).rewards).reshape(-1, 2)
    lesson, engine = RewardModel(spec, load_tokenizer(spec.model)), choose(spec.run, spec.strategy, {})
    classifier, _ = load_classifier(ref, attention=packed_attention.NAME)
    again = drained(scoring(classifier, lesson.pairs["held_out"], 300, engine)).numpy()
    places = [line - 1 for line in lesson.pairs["held_out"].pairs.lines]
    np.testing.assert_allclose(told[places], again, atol=2e-4)
    assert (told[:, 0] > told[:, 1]).mean() > 0.9
    with pytest.raises(BadRequest, match="more than 512 tokens"):
        reward(ref, [[{"role": "user", "content": "word " * 1200}, {"role": "assistant", "content": "yes"}]])

    meter, judge = TokenMeter(), ResolvedJudge(name="the-reward", model=ref)
    grader = graders.read({"type": "reward_model", "name": "liked", "model": "the-reward"})

    def send(request: GenerateRequest, hear: judges.Hear) -> None:
        assert request.reward is not None
        hear([reward(request.model, request.reward)])

    answer = judges.answers(uuid.uuid4(), [judge], send, meter)
    scores = [
        graders.scored(
            grader, graders.grade(grader, GradedSample(rows[0][side][0]["content"]), {"messages": rows[0]["messages"]}, answer)
        ).score
        for side in ("chosen", "rejected")
    ]
    assert scores == pytest.approx([1 / (1 + math.exp(-r)) for r in told[0]], abs=1e-4) and scores[0] > scores[1]
    assert meter.counts()["read"] > 10
    missing = graders.grade(grader, GradedSample("yes"), {"question": "?"}, answer)
    assert "no messages and no prompt" in missing.why

    folder = data_dir / finished.path
    made = run_card((folder / "README.md").read_text(), folder, **{spec.model.name: data_dir / spec.model.path})
    card = [[{"role": "user", "content": "A question?"}, {"role": "assistant", "content": "An answer."}]]
    assert made["head"](made["vector"]).item() == pytest.approx(reward(ref, card).rewards[0], abs=1e-3)


@pytest.mark.long
@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in ALWAYS else [pytest.mark.fault]) for n in ABLE])
def test_every_strategy_trains_one(name: str, data_dir: Path, tiny_model: Path) -> None:
    spec = reward_order(tiny_model, name, max_steps=10, epochs=30, learning_rate=2e-3 if name == "full" else 5e-3, row_losses=False)
    if reason := spec.strategy.unavailable(spec.model.shape, task="reward"):
        pytest.skip(reason)
    said = run(spec, data_dir)
    losses = [step.loss for step in of(said, events.Step)]
    assert isinstance(said[-1], events.Finished) and min(losses[1:]) < losses[0], losses
    told = reward(result_of(spec, said), [[*row["messages"], *row["chosen"]] for row in pair_rows(2)])
    assert all(map(math.isfinite, told.rewards))


def test_what_cannot_train_one_says_so(data_dir: Path, tiny_model: Path) -> None:
    shape = put_model(tiny_model).shape
    assert "does not support the task reward" in str(STRATEGIES["feature_extraction"]().unavailable(shape, task="reward"))
    encoder = shape.model_copy(update={"architecture": "encoder"})
    assert "An encoder writes no text" in str(STRATEGIES["lora"]().unavailable(encoder, task="reward"))
    assert STRATEGIES["lora"].learning_rate_for("reward") == STRATEGIES["lora"].learning_rate_for("classification")


@pytest.mark.long
def test_killed_at_random_moments(data_dir: Path, tiny_model: Path) -> None:
    spec = reward_order(tiny_model, "lora", {"dropout": 0.2}, micro_batches=2, evaluations_per_epoch=3, epochs=3, max_tokens_per_step=240)
    whole, code = WarmTrainer(spec, "whole", 1).run()
    assert code == 0
    said, last = killed_at_random(spec, 5, 2, 7)
    assert facts([*said, *last]) == facts(whole) and weights(last[-1]) == weights(whole[-1])
