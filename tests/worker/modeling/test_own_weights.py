"""What learns of the model itself beside LoRA: its biases and its tables of words. Trained, resumed, laid on by peft, merged, and served."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from app import events
from app.machines.hardware import Machine
from app.planning.memory import memory_of
from app.run_settings import RunSettings
from app.shapes import Shape
from app.spec import Adapter
from app.strategies.lora import Lora
from tests.worker.inference.test_engine import PROMPTS, by_transformers, crowd, request
from tests.worker.orders import chat_rows, order, put_dataset, put_model
from tests.worker.training.test_settings import TEN, in_two, of, run, same
from worker.inference.engine import Engine
from worker.inference.model_pool import ModelPool
from worker.modeling.loading import load_model, load_plain


@pytest.fixture(scope="module")
def biased_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with a bias in every linear layer of its blocks."""
    folder = tmp_path_factory.mktemp("biased") / "model"
    config = LlamaConfig.from_pretrained(tiny_model, attention_bias=True, mlp_bias=True)
    torch.manual_seed(8)
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def served_as_peft_does(model, said: list, data_dir: Path) -> None:
    """The playground writes with the result, beside its base, what transformers and plain peft write."""
    result = said[-1]
    folder = data_dir / result.path
    adapter = Adapter(strategy=json.loads((folder / "strategy.json").read_text())["name"], path=result.path, sha256=result.adapter_sha256)
    base, tuned = model, model.model_copy(update={"adapters": (adapter,)})
    engine = Engine(ModelPool(device="cpu"))
    try:
        for prompt in (PROMPTS[0], PROMPTS[4]):
            expected = [by_transformers(data_dir / model.path, prompt), by_transformers(data_dir / model.path, prompt, adapter=folder)]
            for _ in range(2):  # the base answers the same after the result was laid on a tree that shares its weights
                assert [found for (found,) in crowd(engine, [request(base, prompt), request(tuned, prompt)])] == expected
        assert expected[0] != expected[1], "the adapter changes nothing, so the test shows nothing"
    finally:
        engine.close()

    ids = torch.tensor([list(range(10, 40))])
    plain = AutoModelForCausalLM.from_pretrained(data_dir / model.path, dtype=torch.float32)
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(plain, folder)(ids).logits
        for ours in (load_model(tuned), load_plain(tuned)):
            torch.testing.assert_close(ours(input_ids=ids).logits, theirs, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("strategy", "bias"), [("lora", "all"), ("dora", "lora_only")])
def test_biases_learn_where_they_are_asked_for(data_dir: Path, biased_model: Path, strategy: str, bias: str) -> None:
    model = put_model(biased_model)
    spec = order(model, put_dataset(chat_rows()), strategy, {"bias": bias, "layers": "attention"}, **{**TEN, "learning_rate": 2e-2})
    said = run(spec, data_dir)
    same(in_two(spec, data_dir, 4), said)
    found = load_file(data_dir / said[-1].path / "adapter_model.safetensors")
    assert (
        of(said, events.Started)[0].trainable_parameters == spec.strategy.trainable(model.shape) == sum(x.numel() for x in found.values())
    )
    base = load_file(data_dir / model.path / "model.safetensors")
    learned = {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): x for name, x in found.items() if name.endswith(".bias")
    }
    there = {name for name in base if name.endswith(".bias")}
    assert set(learned) == (there if bias == "all" else {name for name in there if "self_attn" in name}) != set()
    assert all(not torch.equal(x, base[name]) for name, x in learned.items() if "k_proj" not in name)  # softmax does not see a key's bias
    served_as_peft_does(model, said, data_dir)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_biases_learn_in_float32_on_rounded_weights(data_dir: Path, biased_model: Path, precision: str) -> None:
    spec = order(put_model(biased_model), put_dataset(chat_rows()), "lora", {"bias": "all"}, **{**TEN, "precision": precision})
    losses = [e.loss for e in of(run(spec, data_dir), events.Step)]
    assert losses[-1] < losses[0] - 0.01
    found = load_file(data_dir / "runs/job/a1/final/adapter_model.safetensors")
    assert {x.dtype for name, x in found.items() if name.endswith(".bias")} == {torch.float32}
    assert not spec.strategy.joins() and spec.strategy.model_copy(update={"bias": "none"}).joins()


def test_a_blend_takes_the_biases_half_way_too(biased_model: Path, data_dir: Path) -> None:
    model = put_model(biased_model)
    spec = order(model, put_dataset(chat_rows()), "lora", {"bias": "all"}, **{**TEN, "max_steps": 3})
    said = run(spec, data_dir)
    own = load_file(data_dir / model.path / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.bias"
    placed = {}
    for share in (0.0, 0.5, 1.0):
        adapter = Adapter(strategy="lora", path=said[-1].path, sha256=said[-1].adapter_sha256, blend=share)
        loaded = load_plain(model.model_copy(update={"adapters": (adapter,)}))
        placed[share] = loaded.state_dict()[name]
    torch.testing.assert_close(placed[0.0], own[name])
    torch.testing.assert_close(placed[0.5], (placed[0.0] + placed[1.0]) / 2)
    assert not torch.equal(placed[0.0], placed[1.0])


@pytest.fixture(scope="module")
def untied_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with a head of its own."""
    folder = tmp_path_factory.mktemp("untied") / "model"
    torch.manual_seed(9)
    LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_model, tie_word_embeddings=False)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.mark.long
@pytest.mark.parametrize(
    ("strategy", "tied", "names"),
    [("lora", True, "embed_tokens"), ("dora", True, "lm_head"), ("lora", False, "lm_head"), ("rslora", False, "embed_tokens, lm_head")],
)
def test_tables_of_words_learn_whole(data_dir: Path, tiny_model: Path, untied_model: Path, strategy: str, tied: bool, names: str) -> None:
    model = put_model(tiny_model if tied else untied_model)
    spec = order(model, put_dataset(chat_rows()), strategy, {"modules_to_save": names}, **{**TEN, "learning_rate": 2e-2})
    said = run(spec, data_dir)
    same(in_two(spec, data_dir, 4), said)
    one = model.shape.vocabulary * model.shape.hidden
    plain = type(spec.strategy)().trainable(model.shape)
    learns = of(said, events.Started)[0].trainable_parameters
    assert learns == spec.strategy.trainable(model.shape) == plain + one * (1 if tied else len(names.split()))
    found = load_file(data_dir / said[-1].path / "adapter_model.safetensors")
    base = load_file(data_dir / model.path / "model.safetensors")
    kept = {name.split(".")[-2] for name in found if "lora_" not in name}
    assert ("embed_tokens" in kept) if tied else kept == set(names.split(", "))
    for name in kept & {"embed_tokens", "lm_head"}:
        own = next(x for key, x in found.items() if f".{name}.weight" in key)
        assert own.dtype == torch.float32 and not torch.equal(
            own, next(x for key, x in base.items() if "embed_tokens" in key or name in key)
        )
    served_as_peft_does(model, said, data_dir)


def test_a_blend_takes_the_tables_half_way_too(data_dir: Path, tiny_model: Path) -> None:
    model = put_model(tiny_model)
    said = run(order(model, put_dataset(chat_rows()), "lora", {"modules_to_save": "lm_head"}, **{**TEN, "max_steps": 3}), data_dir)
    placed = {}
    for share in (0.0, 0.5, 1.0):
        adapter = Adapter(strategy="lora", path=said[-1].path, sha256=said[-1].adapter_sha256, blend=share)
        loaded = load_plain(model.model_copy(update={"adapters": (adapter,)}))
        placed[share] = loaded.get_input_embeddings().weight
        assert torch.equal(placed[share], loaded.get_output_embeddings().weight)
    torch.testing.assert_close(placed[0.0], load_plain(model).get_input_embeddings().weight)
    torch.testing.assert_close(placed[0.5], (placed[0.0] + placed[1.0]) / 2)
    assert not torch.equal(placed[0.0], placed[1.0])


@pytest.mark.long
def test_tables_learn_in_float32_on_rounded_weights(data_dir: Path, tiny_model: Path) -> None:
    own = {"modules_to_save": "embed_tokens"}
    spec = order(put_model(tiny_model), put_dataset(chat_rows()), "lora", own, **{**TEN, "precision": "bf16", "max_steps": 20})
    losses = [e.loss for e in of(run(spec, data_dir), events.Step)]
    assert losses[-1] < losses[0] - 0.1
    found = load_file(data_dir / "runs/job/a1/final/adapter_model.safetensors")
    assert {x.dtype for x in found.values()} == {torch.float32}


def test_the_estimate_counts_the_tables_and_each_parts_gradient_of_them() -> None:
    small = Shape(
        model_type="llama", architecture="decoder", layers=30, hidden=576, intermediate=1536, heads=9, kv_heads=3, head_dim=64,
        vocabulary=49152, positions=8192, tied=True, gated=True,
    )  # fmt: skip
    table, here = small.vocabulary * small.hidden, Machine(cores=2, memory_bytes=2**35)
    plain, both = (
        memory_of(small, Lora(modules_to_save=names), RunSettings(precision="fp32"), 512, here, 0)
        for names in (None, "embed_tokens, lm_head")
    )
    assert (both.weights - plain.weights, both.gradients - plain.gradients, both.optimizer - plain.optimizer) == (
        4 * table,
        4 * table,
        8 * table,
    )
    assert sum(both.model_dump().values()) - sum(plain.model_dump().values()) >= (4 + 8 + 2 * 4) * table, (
        "two parts, each with its gradient"
    )
