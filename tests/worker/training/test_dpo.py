"""Preference tuning: its loss and gradients against plain torch, packing, whole jobs, and jobs that are killed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from app import events
from app.errors import BadData
from app.kit import manifest
from app.objectives.dpo import PreferenceSettings
from app.settings import get_settings
from app.spec import JobSpec, RunSettings
from app.strategies import STRATEGIES
from tests.tiny import SENTENCES
from tests.worker.orders import WarmTrainer, killed_at_random, order, put_dataset, put_model
from tests.worker.training.test_pair_losses import by_the_papers
from worker.data.batching import BadRow, Row
from worker.data.chat_template import render_prompt
from worker.data.preference_pairs import PreferencePairs, sequences_of, tokenise_pairs
from worker.modeling import packed_attention, token_logprobs
from worker.modeling.cross_entropy import Head
from worker.modeling.token_logprobs import token_nats
from worker.runtime.device import Compute, choose
from worker.runtime.progress import drained
from worker.train import train
from worker.training import optim
from worker.training.objectives.dpo import DPO, log_likelihoods, losses_of, pair_batch

pytestmark = pytest.mark.timeout(240)
ABLE = [name for name, cls in STRATEGIES.items() if "preference" in cls.tasks]


def pair_rows(count: int = 24) -> list[dict[str, Any]]:
    """The better answer speaks of instruments and the worse one counts, in different lengths."""
    rows = []
    for i in range(count):
        words = SENTENCES[i % 13].split()
        rows.append({
            "messages": [{"role": "user", "content": f"{i}: " + " ".join(words[: 2 + i % 4])}],
            "chosen": [{"role": "assistant", "content": " ".join(words[: 3 + i % 5])}],
            "rejected": [{"role": "assistant", "content": " ".join(SENTENCES[13].split()[: 2 + i % 7])}],
        })  # fmt: skip
    return rows


def pair_order(model: Path, strategy: str = "lora", settings: dict[str, Any] | None = None, rows: int = 24, **run: Any) -> JobSpec:
    preference = run.pop("preference", PreferenceSettings())
    spec = order(put_model(model), put_dataset(pair_rows(rows), "preference"), strategy, settings, **run)
    return spec.model_copy(update={"task": "preference", "preference": preference})


def numbered(rows: list[dict[str, Any]]) -> list[Row]:
    return [Row(i, row) for i, row in enumerate(rows, 1)]


def float64(threads: int = 1) -> Compute:
    """Arithmetic in float64, in which two ways to the same number agree to many digits."""

    class Double(Compute):
        compute = torch.float64

    return Double(torch.device("cpu"), "cpu", "fp32", torch.float64, threads)


# The loss ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.7, 5.0)])
def test_gradients_of_weighted_places(monkeypatch: pytest.MonkeyPatch, biased: bool, scale: float, cap: float | None) -> None:
    monkeypatch.setattr(token_logprobs, "chunk_rows", lambda *_: 8)  # several chunks, the last one not full
    draw = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(n, 16, dtype=torch.float64, generator=draw, requires_grad=True) for n in (37, 50))
    bias = torch.randn(50, dtype=torch.float64, generator=draw, requires_grad=True) if biased else None
    targets = torch.randint(0, 50, (37,), generator=draw)
    weights = torch.randn(37, dtype=torch.float64, generator=draw)
    learnt = [x for x in (hidden, weight, bias) if x is not None]

    ours = token_nats(hidden, Head(weight, bias, scale, cap), targets, torch.float64)
    logits = F.linear(hidden, weight, bias) * scale
    plain = F.cross_entropy(logits if cap is None else torch.tanh(logits / cap) * cap, targets, reduction="none")
    torch.testing.assert_close(ours, plain)
    for a, b in zip(torch.autograd.grad((ours * weights).sum(), learnt), torch.autograd.grad((plain * weights).sum(), learnt), strict=True):
        torch.testing.assert_close(a, b)


def plainly(model: torch.nn.Module, data: PreferencePairs, pair: int) -> torch.Tensor:
    """Log-probabilities of the two answers of a pair, each sequence alone, all logits at once."""
    found = []
    for sequence in (2 * pair, 2 * pair + 1):
        part = slice(data.sequences.starts[sequence], data.sequences.starts[sequence + 1])
        ids = torch.from_numpy(data.sequences.ids[part].astype("int64"))[None]
        chances = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        found.append((chances * torch.from_numpy(data.sequences.trained[part])[1:]).sum())
    return torch.stack(found)


def test_packed_pairs_and_their_gradient_are_those_of_plain_torch(tiny_model: Path, tokenizer) -> None:
    data = tokenise_pairs(tokenizer, numbered(pair_rows(5)), "dialogue", 96)
    packed = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation=packed_attention.NAME, dtype=torch.float64)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="sdpa", dtype=torch.float64)
    pack, settings = [3, 0, 4, 1], PreferenceSettings(beta=0.3, label_smoothing=0.1)
    reference = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) - 60

    policy, tokens, answers = log_likelihoods(packed, pair_batch(data, pack, torch.device("cpu")), float64())
    assert tokens == sum(data.pairs.lengths[pair] for pair in pack) and answers == sum(map(data.answer_tokens, sequences_of(pack)))
    losses, _ = losses_of(policy, reference, settings)
    losses.sum().backward()

    alone = torch.stack([plainly(plain, data, pair) for pair in pack])
    torch.testing.assert_close(policy, alone)
    margin = 0.3 * ((alone[:, 0] - reference[:, 0]) - (alone[:, 1] - reference[:, 1]))
    (0.9 * F.softplus(-margin) + 0.1 * F.softplus(margin)).sum().backward()
    for (name, ours), theirs in zip(packed.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
    assert max(float(p.grad.abs().max()) for p in plain.parameters()) > 1e-3


# The data ---------------------------------------------------------------------------------------------------------------


def test_both_answers_follow_the_playgrounds_prompt(tokenizer) -> None:
    row = {
        "messages": [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "Good morning!"},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "How long does varnish dry?"},
        ],
        "chosen": [{"role": "assistant", "content": "A week."}],
        "rejected": [{"role": "assistant", "content": "I do not know, and nobody does."}],
    }
    data = tokenise_pairs(tokenizer, [Row(7, row)], "dialogue", 200)
    _, prompt = render_prompt(tokenizer, "dialogue", row["messages"])
    for sequence, answer in ((0, "chosen"), (1, "rejected")):
        part = slice(data.sequences.starts[sequence], data.sequences.starts[sequence + 1])
        ids, learnt = data.sequences.ids[part], data.sequences.trained[part]
        assert ids[: len(prompt)].tolist() == prompt and not learnt[: len(prompt)].any()
        assert tokenizer.decode(ids[learnt].tolist()) == row[answer][0]["content"] + "<|im_end|>"
    assert (len(data), data.pairs.lines, data.pairs.lengths[0]) == (1, [7], len(data.sequences.ids))


def test_pairs_that_teach_nothing_are_left_out_and_placeholders_come_off(tokenizer) -> None:
    rows = pair_rows(3)
    long = {**rows[1], "messages": [{"role": "user", "content": "word " * 200}]}
    data = tokenise_pairs(tokenizer, numbered([rows[0], long, rows[2]]), "dialogue", 90, [5, 5, 5])
    assert data.pairs.lines == [1, 3] and data.pairs.skipped == [2] and data.pairs.cut == 1
    bare, without = tokenise_pairs(tokenizer, numbered([rows[0], rows[2]]), "dialogue", 90), data.without_lead()
    assert without.sequences.ids.tolist() == bare.sequences.ids.tolist()
    assert without.sequences.trained.tolist() == bare.sequences.trained.tolist()
    assert without.sequences.starts.tolist() == bare.sequences.starts.tolist()
    with pytest.raises(BadRow) as caught:
        tokenise_pairs(tokenizer, [Row(4, {"messages": rows[0]["messages"]})], "dialogue", 90)
    assert caught.value.line == 4


# Jobs -------------------------------------------------------------------------------------------------------------------


def steps_of(said: list[events.TrainerEvent]) -> list[events.Step]:
    return [e for e in said if isinstance(e, events.Step)]


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["lora", "full", "prompt_tuning", "pissa"])
def test_the_margin_rises(data_dir: Path, tiny_model: Path, strategy: str) -> None:
    rate = {"full": 1e-3, "pissa": 5e-3, "prompt_tuning": 3e-2}.get(strategy, 1e-2)
    settings = {"rank": 4} if strategy == "pissa" else {}
    spec = pair_order(tiny_model, strategy, settings, epochs=6, learning_rate=rate, samples=2, sample_tokens=8, max_tokens_per_step=256)
    said = list(train(spec, data_dir / "runs" / strategy / "a1"))
    steps, judged = steps_of(said), [e for e in said if isinstance(e, events.Evaluated)]
    assert isinstance(said[-1], events.Finished) and said[-1].kind == "dialogue"
    if strategy != "prompt_tuning":  # these begin as the very model they are measured from
        assert steps[0].loss == pytest.approx(0.693147, abs=1e-4) and steps[0].metrics["reward_margin"] == pytest.approx(0, abs=1e-4)
    assert steps[-1].metrics["reward_margin"] > steps[0].metrics["reward_margin"] + 0.1
    assert judged[-1].metrics["reward_margin"] > judged[0].metrics["reward_margin"] + 0.1
    assert judged[-1].metrics["reward_accuracy"] > 0.9 and judged[-1].loss < judged[0].loss
    assert set(steps[0].metrics) == {"reward_margin", "reward_accuracy", "chosen_reward", "rejected_reward"}
    samples = next(e for e in said if isinstance(e, events.Sampled)).samples
    asked = {r["messages"][0]["content"]: r["chosen"][0]["content"] for r in pair_rows()}
    assert any(prompt in samples[0].prompt and samples[0].reference == better for prompt, better in asked.items())
    assert said[-1].evaluation["tuned"]["reward_accuracy"] > 0.9
    ledger = json.loads((data_dir / "runs" / strategy / "a1" / "ledger.json").read_text())
    assert sorted(ledger["line"]) == list(range(1, len(pair_rows()) + 1)) and any(ledger["held_out"])
    assert ledger["before"] == pytest.approx([0.693147] * len(ledger["line"]), abs=0.1 if strategy == "prompt_tuning" else 1e-4)
    assert sum(ledger["after"]) < sum(ledger["before"]) - 0.02 * len(ledger["line"])


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": "ipo", "beta": 0.5}, {"length_normalised": True, "beta": 2.0}, {"label_smoothing": 0.2}, {"loss": "robust_dpo"},
        {"loss": "orpo", "beta": 1.0}, {"loss": "simpo"}, {"loss": "cpo"},
    ],
)  # fmt: skip
def test_the_other_losses_learn(data_dir: Path, tiny_model: Path, settings: dict[str, Any]) -> None:
    kind = PreferenceSettings(**settings)
    spec = pair_order(tiny_model, epochs=4, learning_rate=1e-2, max_tokens_per_step=256, preference=kind)
    said = list(train(spec, data_dir / "runs" / "other" / "a1"))
    judged = [e for e in said if isinstance(e, events.Evaluated)]
    assert judged[-1].loss < judged[0].loss and judged[-1].metrics["reward_margin"] > judged[0].metrics["reward_margin"]
    # CPO compares sums without a reference, so of a pair with the longer chosen answer it is hardly ever right.
    assert judged[-1].metrics["reward_accuracy"] > 0.9 or kind.loss == "cpo"
    read = [e for e in said if isinstance(e, events.TaskProgress) and e.what == DPO.preparing]
    kept = (data_dir / "runs" / "other" / "a1" / "reference").exists()
    assert kept == kind.reads_base and (kept or not read), "a loss without a reference never reads the rows with the base"
    contest = said[-1].evaluation["contest"]
    assert contest["metric"] == ("reward_accuracy" if kind.reads_base else "ranking_accuracy")
    assert contest["base"]["score"] == (0.5 if kind.reads_base else judged[0].metrics["reward_accuracy"])
    assert contest["base"]["interval"][0] < contest["base"]["tuned"] - contest["base"]["score"] <= contest["base"]["interval"][1]
    ledger = json.loads((data_dir / "runs" / "other" / "a1" / "ledger.json").read_text())
    assert sum(ledger["after"]) < sum(ledger["before"])


def test_the_chosen_answers_own_loss_is_per_token(data_dir: Path, tiny_model: Path, tokenizer) -> None:
    kind = PreferenceSettings(loss="cpo", beta=0.3, nll_weight=2.0)
    lesson = DPO(pair_order(tiny_model, validation_fraction=0, preference=kind), tokenizer)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation=packed_attention.NAME, dtype=torch.float64)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="sdpa", dtype=torch.float64)
    engine, pack = float64(), [5, 2, 9]
    assert list(lesson.prepare(model, engine, data_dir / "runs" / "cpo" / "a1", 400)) == []
    passed = lesson.loss(model, lesson.batch(pack, engine), engine)
    wanted = []
    for pair in pack:
        sums = plainly(plain, lesson.pairs["train"], pair).tolist()
        wanted.append(by_the_papers(kind, sums, [0.0, 0.0], [lesson.pairs["train"].answer_tokens(2 * pair + side) for side in (0, 1)]))
    assert float(passed.loss.detach()) == pytest.approx(sum(wanted), rel=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("name", ABLE)
def test_every_strategy_takes_a_step(name: str, data_dir: Path, tiny_model: Path, tokenizer) -> None:
    strategy = STRATEGIES[name]()
    spec = pair_order(tiny_model, name)
    if reason := strategy.unavailable(spec.model.shape, task="preference", cuda=torch.cuda.is_available()):
        pytest.skip(reason)
    torch.manual_seed(1)
    lesson, engine = DPO(spec, tokenizer), choose(RunSettings(), strategy)
    model = lesson.load(engine)
    drained(lesson.prepare(model, engine, data_dir / "runs" / name / "a1", 400))
    model = lesson.attach(model).train()
    trained = optim.trained_parameters(model)
    optimizer = optim.make_optimizer(trained, max(1e-2, type(strategy).default_learning_rate), 0.0)
    strategy.begin(model, 4)
    pack, losses = list(range(8)), []
    for step in range(1, 5):
        passed = lesson.loss(model, lesson.batch(pack, engine), engine)
        (passed.loss / len(pack)).backward()
        losses.append(float(passed.loss.detach()) / len(pack))
        optimizer.step()
        strategy.after_step(model, step)
        optimizer.zero_grad()
    assert min(losses[1:]) < losses[0] - 1e-4, losses
    assert passed.measured.shape == (lesson.measures,)
    assert lesson.name_metrics(passed.measured)["reward_accuracy"] >= 0.5


@pytest.mark.parametrize("name", [n for n in STRATEGIES if n not in ABLE])
def test_strategies_that_cannot_say_so(name: str, data_dir: Path, tiny_model: Path) -> None:
    reason = STRATEGIES[name]().unavailable(put_model(tiny_model).shape, task="preference")
    assert reason and "preference" in reason


def facts(said: list[events.TrainerEvent]) -> dict[int, Any]:
    found: dict[int, Any] = {}
    for e in steps_of(said):
        told = (e.loss, e.grad_norm, tuple(e.metrics.values()))
        assert found.setdefault(e.step, told) == told
    return found


def weights(finished: events.TrainerEvent) -> dict[str, str]:
    assert isinstance(finished, events.Finished)
    made = manifest.verify(get_settings().data_dir / finished.path)
    return {name: entry["sha256"] for name, entry in made["files"].items() if name.endswith(".safetensors")}


@pytest.mark.long
@pytest.mark.parametrize(("strategy", "settings"), [("lora", {"dropout": 0.2}), pytest.param("full", {}, marks=pytest.mark.fault)])
def test_killed_at_random_moments(data_dir: Path, tiny_model: Path, strategy: str, settings: dict[str, Any]) -> None:
    spec = pair_order(tiny_model, strategy, settings, micro_batches=2, evaluations_per_epoch=3, epochs=3, max_tokens_per_step=240)
    whole, code = WarmTrainer(spec, "whole", 1).run()
    assert code == 0 and isinstance(whole[-1], events.Finished)
    said, last = killed_at_random(spec, 5, 3, 7)
    assert facts([*said, *last]) == facts(whole)
    assert weights(last[-1]) == weights(whole[-1])
    kept = list((data_dir / "runs" / "killed").glob("a*/reference"))
    assert len(kept) == 1, "the reference is scored once for all attempts"


def test_a_torn_reference_is_scored_again(data_dir: Path, tiny_model: Path, tokenizer) -> None:
    spec = pair_order(tiny_model)
    engine, found = choose(RunSettings(), spec.strategy), []
    for attempt in (1, 2, 3):
        lesson = DPO(spec, tokenizer)
        drained(lesson.prepare(lesson.load(engine), engine, data_dir / "runs" / "torn" / f"a{attempt}", 400))
        found.append(lesson.reference["train"])
        if attempt == 1:
            path = data_dir / "runs" / "torn" / "a1" / "reference" / "reference.safetensors"
            path.write_bytes(path.read_bytes()[:-4])
    assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])
    assert sorted(p.parent.name for p in (data_dir / "runs" / "torn").glob("a*/reference")) == ["a1", "a2"]


def test_rows_without_a_difference_are_refused(data_dir: Path, tiny_model: Path, tokenizer) -> None:
    row = pair_rows(1)[0]
    data = put_dataset([{**row, "rejected": row["chosen"]}], "preference")
    spec = pair_order(tiny_model).model_copy(update={"dataset": data})
    with pytest.raises(BadData, match="None of the 1 pairs"):
        DPO(spec, tokenizer)


# As the model is asked later ------------------------------------------------------------------------------------------------


def test_a_generic_model_learns_from_the_words_as_the_playground_gives_them(tokenizer: Any, tiny_model: Path) -> None:
    """No roles and no system message around them, and no template saved with the result."""
    row = {
        "messages": [
            {"role": "system", "content": "Be short."}, {"role": "user", "content": "One."}, {"role": "assistant", "content": " Two."},
            {"role": "user", "content": "Three?"},
        ],
        "chosen": [{"role": "assistant", "content": " Four."}],
        "rejected": [{"role": "assistant", "content": " Five, six."}],
    }  # fmt: skip
    data = tokenise_pairs(tokenizer, numbered([row]), "generic", 99)
    _, asked = render_prompt(tokenizer, "generic", "One. Two.Three?")  # the history of a column of the playground, and what is typed
    for place, answer in enumerate((" Four.", " Five, six.")):
        ids = data.sequences.ids[data.sequences.starts[place] : data.sequences.starts[place + 1]].tolist()
        assert ids == [*asked, *tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        assert data.answer_tokens(place) == len(ids) - len(asked)
    spec = pair_order(tiny_model, samples=2)
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    lesson = DPO(spec.model_copy(update={"model": spec.model.model_copy(update={"kind": "generic"})}), bare)
    assert bare.chat_template is None and "template" not in " ".join(lesson.remarks())
    assert lesson.questions and all("###" not in tokenizer.decode(q.ids) and tokenizer.decode(q.ids) == q.text for q in lesson.questions)


@pytest.mark.parametrize(("strategy", "share"), [("lora", 1 / 10), ("prompt_tuning", 1 / 10), ("full", 1 / 30)])
def test_steps_are_smaller_for_pairs(tiny_model: Path, strategy: str, share: float) -> None:
    spec = pair_order(tiny_model, strategy, learning_rate=None)
    usual = type(spec.strategy).default_learning_rate
    assert spec.learning_rate == pytest.approx(share * usual) and spec.model_copy(update={"task": "generation"}).learning_rate == usual
