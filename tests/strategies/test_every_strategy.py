"""What every strategy has to keep, run over the registry: a file added to `app/strategies/` is tested without another edit."""

from __future__ import annotations

import contextlib
import itertools
import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from app.kit.forms import controls, fill
from app.models.model_card import AppliedAdapter, Provenance, load_code
from app.shapes import Shape, shape_of
from app.spec import RunSettings
from app.strategies import STRATEGIES, Memory, Strategy
from app.strategies._model import blocks, feed_forward_output
from tests.card_code import run_card
from tests.worker.orders import chat_rows
from worker.data.batching import Row, Tokenised, make_batch, tokenise
from worker.modeling import fused_layers, packed_attention
from worker.modeling.cross_entropy import head_of, linear_cross_entropy
from worker.runtime.device import choose
from worker.scoring import held_out
from worker.scoring.answers import answers
from worker.training import optim

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


def fresh(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=packed_attention.NAME, dtype=dtype)
    model.name_or_path = model.config._name_or_path = "tiny"
    fused_layers.patch_norms_and_mlp(model)
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


def learn(
    strategy: Strategy, model: torch.nn.Module, data: Tokenised, steps: int, precision: str = "fp32", least: float = 1e-2
) -> list[float]:
    """Some steps on the same rows, as `worker/train.py` takes them; the losses."""
    engine = choose(RunSettings(precision=precision), strategy)
    trained = optim.trained_parameters(model)
    optimizer = optim.make_optimizer(trained, max(least, type(strategy).default_learning_rate), 0.0)
    strategy.begin(model, steps)
    batch, losses = make_batch(data, list(range(len(data))), engine.device), []
    for step in range(1, steps + 1):
        hidden = held_out.hidden_states(model, batch, engine)
        loss = linear_cross_entropy(hidden, head_of(held_out.plain_model(model)), batch.targets, engine.compute) / batch.trained
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
    with held_out.evaluating(model):
        hidden = held_out.hidden_states(model, batch, choose(RunSettings(precision="fp32"), STRATEGIES["lora"]()))
        return held_out.plain_model(model).get_output_embeddings()(hidden)


DELICATE = {"full", "pissa"}
"""They move the largest directions of the weights: at ten times the rate, every last digit doubles from step to step."""


@pytest.mark.long
@pytest.mark.parametrize("name", WRITERS)
def test_bf16_where_it_is_chosen_learns_as_float32_does(name: str, tiny_model: Path, shape: Shape, tokenizer) -> None:
    strategy = runnable(name, shape)
    if not strategy.trains_in_bf16():
        pytest.skip("A processor trains it in float32.")
    data, told = data_for(tokenizer, strategy), {}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16 if strategy.adapter else torch.float32)):
        model = fresh(tiny_model, dtype)
        torch.manual_seed(1)
        model = strategy.attach(model)
        fused_layers.speed_up(model, choose(RunSettings(precision=precision), strategy), 0.0)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        told[precision] = learn(strategy, model, data, 8, precision, least=1e-3 if name in DELICATE else 1e-2)
    assert told["fp32"][-1] < told["fp32"][0]
    assert told["bf16"] == pytest.approx(told["fp32"], rel=0.002 if name in DELICATE else 0.01)


def test_a_norm_of_two_types_learns_in_the_wider() -> None:
    torch.manual_seed(0)
    model = BertModel(
        BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    ).bfloat16()
    model = STRATEGIES["bitfit"]().attach(model, task="classification", labels=2)
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=torch.tensor([[1, 2, 3]])).last_hidden_state.float().pow(2).sum().backward()
    bias = model.encoder.layer[0].output.LayerNorm.bias
    assert bias.dtype == torch.float32 and bias.grad.abs().sum() > 0


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


def test_what_the_guide_says_of_sizes_is_so() -> None:
    """On the starters: SmolLM2 of 135 M and MiniLM."""
    small = Shape(
        model_type="llama", architecture="decoder", layers=30, hidden=576, intermediate=1536, heads=9, kv_heads=3, head_dim=64,
        vocabulary=49152, positions=8192, tied=True, gated=True,
    )  # fmt: skip
    encoder = ENCODER.model_copy(update={"layers": 6, "hidden": 384, "intermediate": 1536, "heads": 12, "kv_heads": 12, "head_dim": 32})
    for shape in (small, encoder):
        learns = {name: STRATEGIES[name]().trainable(shape) for name in ("lora", "vera", "ia3", "layer_norm")}
        assert 9 < learns["lora"] / learns["vera"] < 15, "some ten times fewer numbers"
        assert 1000 < learns["ia3"] / shape.layers < 10_000, "a few thousand a layer"
        assert 4 * learns["layer_norm"] < 500_000, "a few hundred kilobytes"
    random = STRATEGIES["vera"]().memory(encoder).weights - 4 * encoder.parameters()
    assert random > 4 * STRATEGIES["lora"]().trainable(encoder), "the file holds the random matrices too"


@pytest.mark.parametrize("name", WRITERS)
def test_it_learns_what_it_says_and_is_kept(name: str, tiny_model: Path, tokenizer, shape: Shape, tmp_path: Path) -> None:
    strategy = runnable(name, shape)
    data = data_for(tokenizer, strategy)
    model = strategy.attach(fresh(tiny_model)).train()
    for one in (model, strategy.attach(fresh(tiny_model, torch.bfloat16))):
        counted = sum(p.numel() for p in optim.trained_parameters(one).values())
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

    asked = held_out.questions(tokenizer, [Row(1, chat_rows(1)[0]), Row(2, chat_rows(2)[1])], "dialogue", 2, 200)
    lead = [tokenizer.pad_token_id] * strategy.virtual_tokens()
    engine = choose(RunSettings(precision="fp32"), strategy)
    together = answers(again, tokenizer, asked, 8, engine, lead)
    apart = list(itertools.chain(*(answers(again, tokenizer, [q], 8, engine, lead) for q in asked)))
    assert together == apart  # padding on the left changes nothing

    tokenizer.save_pretrained(folder)
    made_of = Provenance("base", (AppliedAdapter("it", strategy),)) if strategy.adapter else Provenance(None)
    elsewhere = run_card(f"```python\n{load_code('dialogue', made_of)}```", folder, base=tiny_model)["model"].eval()
    ids = torch.tensor([asked[0].ids])
    with torch.no_grad():
        theirs = elsewhere(input_ids=ids).logits[:, -ids.shape[1] :]
        ours = again.eval()(input_ids=torch.cat([torch.tensor([lead], dtype=ids.dtype), ids], 1)).logits[:, -ids.shape[1] :]
    torch.testing.assert_close(theirs, ours, atol=2e-5, rtol=1e-4)

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


SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512}
ENCODER = shape_of({"model_type": "bert", "max_position_embeddings": 128, "type_vocab_size": 2, **SIZES})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("task", ["generation", "preference"])
def test_an_encoder_is_never_taught_to_write(name: str, task: str) -> None:
    assert STRATEGIES[name]().unavailable(ENCODER, task=task, cuda=True)


# Other models than the small one --------------------------------------------------------------------------------------


def built(kind: str) -> torch.nn.Module:
    """A model of two layers with random weights: an encoder without its pooler, a decoder with biases whose head is its own."""
    torch.manual_seed(0)
    if kind == "encoder":
        config = BertConfig(**SIZES, max_position_embeddings=128, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
        model = BertModel(config, add_pooling_layer=False)
    elif kind == "biases":
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False))
    model.set_attn_implementation(packed_attention.NAME)
    model.name_or_path = model.config._name_or_path = kind
    fused_layers.patch_norms_and_mlp(model)
    return model


def shape_built(kind: str) -> Shape:
    return shape_of(built(kind).config.to_dict())


def states(model: torch.nn.Module, lead: int) -> torch.Tensor:
    """Last states, (T, H), of two packed sequences that begin with `lead` placeholders."""
    sequences = [[0] * lead + list(range(3, 27)), [0] * lead + list(range(9, 26))]
    lengths = [len(ids) for ids in sequences]
    ids, places = torch.tensor([[*itertools.chain(*sequences)]]), torch.cat([torch.arange(n) for n in lengths])[None]
    plain = held_out.plain_model(model)
    body = plain.get_decoder() if hasattr(plain, "lm_head") else plain
    return body(input_ids=ids, position_ids=places, **packed_attention.packed_arguments(lengths, torch.device("cpu"))).last_hidden_state[0]


def variants(name: str) -> list[Strategy]:
    """The strategy with its defaults, and with each choice and each whole number set otherwise."""
    cls = STRATEGIES[name]
    found = [cls()]
    for field, info in cls.model_fields.items():
        kinds = get_args(info.annotation) or (info.annotation,)
        others = [True, False] if bool in kinds else [16, 3, 1] if int in kinds else [k for k in kinds if isinstance(k, str)]
        for value in others if field != "name" else ():
            with contextlib.suppress(ValueError):
                found.append(cls(**{field: value}))
    return list(dict.fromkeys(found))


def learning(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """What learns, by name; nothing in a stack on which a head alone learns."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


KINDS = ["encoder", "biases", "untied"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_what_it_trains_is_counted_whatever_its_settings(name: str, kind: str) -> None:
    shape, task = shape_built(kind), "classification" if kind == "encoder" else "generation"
    able = [one for one in variants(name) if one.unavailable(shape, task=task, cuda=torch.cuda.is_available()) is None]
    if not able:
        pytest.skip(STRATEGIES[name]().unavailable(shape, task=task, cuda=torch.cuda.is_available()))
    for strategy in able:
        model = strategy.attach(built(kind), task=task, labels=3)
        head = strategy.head_parameters(shape, 3) if task == "classification" else 0
        assert sum(p.numel() for p in learning(model).values()) == strategy.trainable_parameters(shape, task=task, labels=3) - head, (
            strategy
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_recomputed_layers_give_the_same_gradients(name: str, kind: str) -> None:
    strategy, task = STRATEGIES[name](), "classification" if kind == "encoder" else "generation"
    if reason := strategy.unavailable(shape_built(kind), task=task, cuda=torch.cuda.is_available()):
        pytest.skip(reason)

    def learnt(layers: int) -> tuple[float, dict[str, torch.Tensor], int]:
        model = built(kind)
        fused_layers.recompute_layers(model, layers)
        passes = []
        feed_forward_output(blocks(model)[0]).register_forward_pre_hook(lambda *_: passes.append(1))
        model = strategy.attach(model, task=task, labels=3).train()
        torch.manual_seed(1)
        for p in learning(model).values():
            p.data += torch.randn_like(p) * 0.02  # a correction that starts at zero would pass no gradient on
        found = states(model, strategy.virtual_tokens())
        loss = (found * torch.linspace(-1, 1, found.shape[1])).pow(2).mean()
        if loss.requires_grad:
            loss.backward()
        return loss.item(), {n: p.grad for n, p in learning(model).items() if p.grad is not None}, len(passes)

    plain, again = learnt(0), learnt(2)
    assert again[0] == pytest.approx(plain[0], abs=1e-6) and plain[1].keys() == again[1].keys()
    for parameter, gradient in plain[1].items():
        torch.testing.assert_close(again[1][parameter], gradient, atol=1e-6, rtol=1e-4, msg=parameter)
    if strategy.reaches(shape_built(kind)):
        assert again[2] == plain[2] + (strategy.reaches(shape_built(kind)) == 2) and any(
            gradient.abs().max() > 0 for gradient in plain[1].values()
        )


def test_an_output_layer_that_is_the_embedding_too_takes_gradients_all_the_way_down() -> None:
    cls = STRATEGIES["top_layers"]
    for kind, layers in (("biases", 2), ("untied", 1)):
        strategy = cls(layers=1, output_layer=True)
        model = strategy.attach(built(kind)).train()
        reached = []
        blocks(model)[0].register_full_backward_hook(lambda *_, found=reached: found.append(1))
        states(model, 0).pow(2).mean().backward()
        assert strategy.reaches(shape_built(kind)) == layers == 1 + len(reached)
