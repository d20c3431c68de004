"""What every strategy has to keep, run over the registry: a file added to `app/strategies/` is tested without another edit."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.forms import controls, fill
from app.shapes import Shape, shape_of
from app.spec import RunSettings
from app.strategies import STRATEGIES, Memory, Strategy
from tests.worker.orders import chat_rows
from worker import attention, evaluate, kernels, optim
from worker.batches import Row, Tokenised, make_batch, tokenise
from worker.device import choose
from worker.loss import head_of, linear_cross_entropy

NAMES = list(STRATEGIES)
WRITERS = [name for name, cls in STRATEGIES.items() if cls.recipe == "gradient" and "generation" in cls.tasks]


@pytest.fixture(autouse=True)
def somewhere(data_dir: Path) -> None:
    """A machine's measured speed is kept in the data folder; here in one of the test's own."""


@pytest.fixture(scope="module")
def shape(tiny_model: Path) -> Shape:
    return shape_of(json.loads((tiny_model / "config.json").read_text()))


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path):
    return AutoTokenizer.from_pretrained(tiny_model)


def fresh(folder: Path) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention.NAME)
    model.name_or_path = model.config._name_or_path = "tiny"
    kernels.use_fused_norms(model)
    return model


def runnable(name: str, shape: Shape) -> Strategy:
    """The strategy with its defaults, or a skip that says why this machine or model cannot run it."""
    strategy = STRATEGIES[name]()
    if reason := strategy.unavailable(shape, cuda=torch.cuda.is_available()):
        pytest.skip(reason)
    return strategy


def data_for(tokenizer, strategy: Strategy) -> Tokenised:
    lead = [tokenizer.pad_token_id] * strategy.virtual_tokens()
    return tokenise(tokenizer, [Row(i, row) for i, row in enumerate(chat_rows(8), 1)], "dialogue", 96, lead)


def learn(strategy: Strategy, model: torch.nn.Module, data: Tokenised, steps: int) -> list[float]:
    """Some steps on the same rows, as `worker/train.py` takes them; the losses."""
    engine = choose(RunSettings(precision="fp32"), strategy)
    trained = optim.trained_parameters(model)
    optimizer = optim.make_optimizer(trained, max(1e-2, type(strategy).default_learning_rate), 0.0)
    strategy.begin(model, steps)
    batch, losses = make_batch(data, list(range(len(data))), engine.device), []
    for step in range(1, steps + 1):
        hidden = evaluate.hidden_states(model, batch, engine)
        loss = linear_cross_entropy(hidden, head_of(evaluate.plain_model(model)), batch.targets) / batch.trained
        extra = strategy.regulariser(model)
        (loss if extra is None else loss + extra).backward()
        optimizer.step()
        strategy.after_step(model, step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def logits(model: torch.nn.Module, data: Tokenised) -> torch.Tensor:
    """Of the packed rows, so that every architecture of the engine is in play."""
    batch = make_batch(data, [0, 1, 2], torch.device("cpu"))
    with evaluate.evaluating(model):
        hidden = evaluate.hidden_states(model, batch, choose(RunSettings(precision="fp32"), STRATEGIES["lora"]()))
        return evaluate.plain_model(model).get_output_embeddings()(hidden)


@pytest.mark.parametrize("name", NAMES)
def test_its_words_and_defaults(name: str) -> None:
    cls = STRATEGIES[name]
    strategy = cls()
    assert strategy.name == name and cls.title and cls.summary.endswith(".") and cls.when_to_use.endswith(".")
    assert cls.drawing()["layers"] and len(cls.drawing()["layers"]) == 6
    for field, info in cls.model_fields.items():
        assert field == "name" or (info.description or "").strip(), f"{field} needs a description: it is the help in the form"
    assert cls.model_validate_json(strategy.model_dump_json()) == strategy


@pytest.mark.parametrize("name", NAMES)
def test_form_round_trip(name: str) -> None:
    """What the form shows for the defaults reads back as the defaults."""
    cls = STRATEGIES[name]
    shown = {control.key: control.value for control in controls(cls, "strategy")}
    assert set(shown) == {f"strategy.{field}" for field in cls.model_fields if field != "name"}
    filled = fill(cls, shown, "strategy")
    assert not filled.errors and cls(**filled.settings) == cls()


@pytest.mark.parametrize("name", NAMES)
def test_arithmetic(name: str, shape: Shape) -> None:
    strategy = STRATEGIES[name]()
    memory = strategy.memory(shape, weight_bytes=4)
    assert isinstance(memory, Memory) and all(part >= 0 for part in memory)
    assert memory.weights > 0 and memory.optimizer >= memory.gradients >= 0


@pytest.mark.parametrize("name", WRITERS)
def test_it_learns_what_it_says_and_is_kept(name: str, tiny_model: Path, tokenizer, shape: Shape, tmp_path: Path) -> None:
    strategy = runnable(name, shape)
    data = data_for(tokenizer, strategy)
    model = strategy.attach(fresh(tiny_model)).train()
    counted = sum(p.numel() for p in optim.trained_parameters(model).values())
    assert counted == strategy.trainable(shape)

    losses = learn(strategy, model, data, 12)
    assert min(losses[-3:]) < losses[0] - 0.005, losses

    after = logits(model, data)
    folder = tmp_path / "saved"
    folder.mkdir()
    strategy.save(model, folder)
    assert not [p for p in folder.rglob("*") if p.suffix in (".bin", ".pt", ".pkl")]
    again = strategy.load(fresh(tiny_model), folder)
    torch.testing.assert_close(logits(again, data), after, atol=2e-5, rtol=1e-4)

    asked = evaluate.questions(tokenizer, [Row(1, chat_rows(1)[0]), Row(2, chat_rows(2)[1])], "dialogue", 2, 200)
    lead = [tokenizer.pad_token_id] * strategy.virtual_tokens()
    engine = choose(RunSettings(precision="fp32"), strategy)
    together = evaluate.answers(again, tokenizer, asked, 8, engine, lead)
    apart = list(itertools.chain(*(evaluate.answers(again, tokenizer, [q], 8, engine, lead) for q in asked)))
    assert together == apart  # padding on the left changes nothing

    if type(strategy).merges:
        merged = strategy.merge(again)
        assert type(merged) is type(fresh(tiny_model))
        torch.testing.assert_close(logits(merged, data), after, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", [n for n in WRITERS if STRATEGIES[n].adapter])
def test_loading_leaves_the_base_alone(name: str, tiny_model: Path, tokenizer, shape: Shape, tmp_path: Path) -> None:
    """Siblings share the base's tensors, so laying one adapter on must not write to them."""
    strategy = runnable(name, shape)
    data = data_for(tokenizer, strategy)
    model = strategy.attach(fresh(tiny_model)).train()
    learn(strategy, model, data, 2)
    strategy.save(model, tmp_path)
    base = fresh(tiny_model)
    kept = [(p, p.detach().clone()) for p in base.parameters()]
    strategy.load(base, tmp_path)
    assert all(torch.equal(p, before) for p, before in kept)


ENCODER = shape_of(
    {"model_type": "bert", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
     "vocab_size": 512, "max_position_embeddings": 128, "type_vocab_size": 2}
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("task", ["generation", "preference"])
def test_an_encoder_is_never_taught_to_write(name: str, task: str) -> None:
    assert STRATEGIES[name]().unavailable(ENCODER, task=task, cuda=True)
