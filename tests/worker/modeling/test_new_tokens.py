"""New tokens: their rows learn under every method, and are saved, resumed, merged, served and exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from app import events
from app.errors import BadData
from app.kit import manifest
from app.models.integrity import BadModel
from app.shapes import STRUCTURE, Shape, shape_of
from app.spec import Adapter, JobSpec, ModelRef
from app.strategies import STRATEGIES
from app.strategies._files import NEW_TOKENS
from tests.card_code import run_card
from tests.tiny import build_tokenizer
from tests.worker.evaluation.test_certificates import kept
from tests.worker.inference.test_engine import by_transformers, crowd, request
from tests.worker.orders import chat_rows, order, put_dataset, put_model
from tests.worker.training.test_settings import in_two, of, run, same
from worker.conversion.merge import merge
from worker.exporters import _process
from worker.inference.engine import Engine
from worker.inference.model_pool import ModelPool
from worker.modeling import new_tokens, packed_attention
from worker.modeling.cross_entropy import Head, NewRows, linear_cross_entropy, plain_nats
from worker.modeling.loading import load_model, load_plain, load_tokenizer
from worker.runtime.device import choose
from worker.scoring import held_out
from worker.training.objectives import objective_of

WORDS = ("fingerboard", "<tool>")
WRITERS = [name for name, cls in STRATEGIES.items() if cls.recipe == "gradient" and "generation" in cls.tasks]
SHORT = {"max_steps": 6, "epochs": 50, "learning_rate": 1e-2, "row_losses": False, "new_tokens": WORDS, "evaluations_per_epoch": 0}


def rows() -> list[dict]:
    """Conversations full of both strings."""
    found = chat_rows()
    for row in found:
        row["messages"][0]["content"] = "<tool> " + row["messages"][0]["content"]
        row["messages"][1]["content"] += " The fingerboard<tool>"
    return found


def spec_of(folder: Path, strategy: str = "lora", **settings) -> JobSpec:
    return order(put_model(folder), put_dataset(rows()), strategy, **{**SHORT, **settings})


def tuned(spec: JobSpec, said: list) -> ModelRef:
    if not type(spec.strategy).adapter:
        return spec.model.model_copy(update={"path": said[-1].path, "revision": said[-1].revision})
    adapter = Adapter(strategy=spec.strategy.name, path=said[-1].path, sha256=said[-1].adapter_sha256)
    return spec.model.model_copy(update={"adapters": (*spec.model.adapters, adapter)})


def variant(tiny_model: Path, folder: Path, **settings) -> Path:
    """The small model with an output layer of its own, or other settings."""
    torch.manual_seed(8)
    LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_model, **settings)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


# The loss -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bias", "scale", "cap"), [(False, 1.0, None), (True, 0.5, None), (False, 1.0, 2.0)])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_the_loss_gives_new_rows_the_gradient_that_the_whole_head_would_have(bias: bool, scale: float, cap: float | None, compute) -> None:
    torch.manual_seed(3)
    hidden, weight, targets = torch.randn(40, 32), torch.randn(90, 32), torch.randint(0, 90, (40,))
    targets[::7] = -100
    own_bias = torch.randn(90) if bias else None
    found = []
    for way in ("ours", "plain", "whole"):
        state, rows = hidden.clone().requires_grad_(), weight[60:65].clone().requires_grad_()
        whole = weight.clone().requires_grad_(way == "whole")
        head = Head(whole, own_bias, scale, cap, None, None if way == "whole" else NewRows(60, rows))
        loss = plain_nats(state, head, targets, compute).sum() if way == "plain" else linear_cross_entropy(state, head, targets, compute)
        loss.backward()
        found.append((loss.detach(), state.grad, whole.grad[60:65] if way == "whole" else rows.grad))
        assert way == "whole" or whole.grad is None
    near = {"atol": 1e-4, "rtol": 1e-4} if compute == torch.float32 else {"atol": 0.1, "rtol": 0.05}
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, two, **near)


def test_an_embedding_multiplies_the_gradient_as_it_multiplies_its_rows(tmp_path: Path) -> None:
    """Gemma's rows are scaled by the root of the width: the rows that learn have the gradient of rows of the table."""
    from benchmarks.architectures import small_model

    model = small_model("gemma3_text", torch.float32).requires_grad_(False)
    tokenizer = build_tokenizer()
    new_tokens.widen(model, new_tokens.add_to(tokenizer, WORDS))
    ids = torch.tensor([[5, 512, 9, 513, 512]])
    table = model.get_input_embeddings().weight.requires_grad_()
    model.model(input_ids=ids).last_hidden_state.square().sum().backward()
    wanted = table.grad[512:514]
    table.requires_grad_(False)
    before = model.model(input_ids=ids).last_hidden_state
    learned = new_tokens.learn(model)
    after = model.model(input_ids=ids).last_hidden_state
    assert torch.equal(before, after)
    after.square().sum().backward()
    torch.testing.assert_close(learned[0].rows.grad, wanted, atol=1e-4, rtol=1e-4)


# A whole job ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
def test_they_learn_under_every_method_and_are_loaded_as_they_were(name: str, data_dir: Path, tiny_model: Path) -> None:
    spec = spec_of(tiny_model, name)
    if reason := spec.strategy.unavailable(spec.model.shape):
        pytest.skip(reason)
    said = run(spec, data_dir)
    losses = [e.loss for e in of(said, events.Step)]
    assert losses[-1] < losses[0], losses
    tokenizer, ref = build_tokenizer(), tuned(spec, said)
    start = load_plain(spec.model)
    added = new_tokens.add_to(tokenizer, WORDS)
    new_tokens.widen(start, added)
    model = load_model(ref, attention=packed_attention.NAME)
    table, began = model.get_input_embeddings().weight, start.get_input_embeddings().weight
    assert len(table) == 514 and all(not torch.equal(table[i], began[i]) for i in (512, 513)), "their rows have not learned"
    if type(spec.strategy).adapter:
        assert torch.equal(table[:512], began[:512]), "a row of the base has changed"
        assert torch.equal(load_file(data_dir / said[-1].path / NEW_TOKENS)["embedding"], table[512:])
    # The trainer's last score is that of the result as it is loaded, with the tokenizer in its folder.
    lesson = objective_of(spec, load_tokenizer(spec.model))
    engine = choose(spec.run, spec.strategy)
    assert load_tokenizer(ref).convert_tokens_to_ids(list(WORDS)) == [512, 513]
    again = held_out.validate(model, lesson.held_out, 160, engine)
    assert again["loss"] == pytest.approx(of(said, events.Evaluated)[-1].loss, abs=2e-5)
    if type(spec.strategy).adapter and type(spec.strategy).merges:
        ids = torch.tensor([[7, 512, 30, 513, 9]])
        torch.testing.assert_close(load_plain(ref)(input_ids=ids).logits, load_model(ref)(input_ids=ids).logits, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "settings"), [("lora", {}), ("prompt_tuning", {}), ("full", {}), ("lora", {"tie_word_embeddings": False})]
)
def test_a_job_with_them_resumes_bit_for_bit(name: str, settings: dict, data_dir: Path, tiny_model: Path, tmp_path: Path) -> None:
    folder = variant(tiny_model, tmp_path / "own", **settings) if settings else tiny_model
    spec = spec_of(folder, name, validation_fraction=0)
    said = run(spec, data_dir)
    same(in_two(spec, data_dir, 3), said)
    first, second = (data_dir / "runs" / job / "final" / NEW_TOKENS for job in ("job/a1", "halved/a2"))
    if name != "full":
        assert first.read_bytes() == second.read_bytes()
        assert ("head" in load_file(first)) == bool(settings), "a head of its own has rows of its own"


def test_a_model_read_from_its_structure_counts_them_and_has_a_bias_in_its_head(data_dir: Path, tmp_path: Path) -> None:
    kept("phi", tmp_path / "phi")
    for name in ("lora", "full"):
        spec = spec_of(tmp_path / "phi", name, validation_fraction=0)
        said = run(spec, data_dir, name)
        ref = tuned(spec, said)
        folder = data_dir / said[-1].path
        if name == "lora":
            assert load_file(folder / NEW_TOKENS)["bias"].shape == (2,)
            merge(ref, folder := tmp_path / "merged")
        model = AutoModelForCausalLM.from_pretrained(folder)
        shape = shape_of(json.loads((folder / "config.json").read_text()))
        assert (model.config.vocab_size, shape.vocabulary, model.lm_head.bias.shape[0]) == (514, 514, 514)
        assert shape.parameters() == sum(weight.numel() for weight in model.parameters())
        assert Shape.model_validate(getattr(model.config, STRUCTURE)).structure.head == model.lm_head.weight.numel() + 514


def test_rows_that_a_table_had_to_spare_are_taken_first(data_dir: Path, tiny_model: Path, tmp_path: Path) -> None:
    folder = variant(tiny_model, tmp_path / "wide", vocab_size=576)
    spec = spec_of(folder, validation_fraction=0)
    said = run(spec, data_dir)
    model = load_model(tuned(spec, said))
    assert len(model.get_input_embeddings().weight) == 576 and load_file(data_dir / said[-1].path / NEW_TOKENS)["ids"].tolist() == [
        512,
        513,
    ]
    assert not torch.equal(model.get_input_embeddings().weight[512], load_plain(spec.model).get_input_embeddings().weight[512])


def test_the_result_is_served_beside_its_base_merged_and_fine_tuned_again(data_dir: Path, tiny_model: Path, tmp_path: Path) -> None:
    spec = spec_of(tiny_model, validation_fraction=0, max_steps=20)
    said = run(spec, data_dir)
    ref = tuned(spec, said)
    merge(ref, tmp_path / "merged")
    engine = Engine(ModelPool(device="cpu"))
    try:
        for prompt in ("The <tool>", "A fingerboard and"):
            expected = [by_transformers(data_dir / spec.model.path, prompt), by_transformers(tmp_path / "merged", prompt)]
            for _ in range(2):  # the base answers as before beside a tree with longer tables
                assert [found for (found,) in crowd(engine, [request(spec.model, prompt), request(ref, prompt)])] == expected
            assert expected[0] != expected[1]
    finally:
        engine.close()
    ids = torch.tensor([[512, 30, 513, 9]])
    card = (data_dir / said[-1].path / "README.md").read_text()
    elsewhere = run_card(card, data_dir / said[-1].path, tiny=data_dir / spec.model.path)
    assert elsewhere["tokenizer"]("fingerboard").input_ids == [512]
    with torch.no_grad():
        torch.testing.assert_close(elsewhere["model"].eval()(ids).logits, load_model(ref)(input_ids=ids).logits, atol=2e-5, rtol=1e-4)

    more = order(ref, put_dataset(rows()), "lora", **{**SHORT, "new_tokens": ("violin maker",), "validation_fraction": 0})
    second = tuned(more, run(more, data_dir, "second"))
    model, tokenizer = load_model(second), load_tokenizer(second)
    assert tokenizer.convert_tokens_to_ids([*WORDS, "violin maker"]) == [512, 513, 514] and len(model.get_input_embeddings().weight) == 515


def test_a_blend_of_a_whole_model_leaves_their_rows_whole(data_dir: Path, tiny_model: Path) -> None:
    spec = spec_of(tiny_model, "full", validation_fraction=0)
    said = run(spec, data_dir)
    whole, base = load_model(tuned(spec, said)).get_input_embeddings().weight, load_model(spec.model).get_input_embeddings().weight
    part = Adapter(strategy="full", path=said[-1].path, sha256=said[-1].revision, blend=0.5)
    half = load_model(spec.model.model_copy(update={"adapters": (part,)})).get_input_embeddings().weight
    assert torch.equal(half[512:], whole[512:])
    torch.testing.assert_close(half[:512], (whole[:512] + base) / 2)


@pytest.mark.long
def test_llama_cpp_writes_what_the_model_does(data_dir: Path, tiny_model: Path, tmp_path: Path) -> None:
    spec = spec_of(tiny_model)
    ref = tuned(spec, run(spec, data_dir))
    known = {"title": "t", "license": None, "upstream": "tiny", "system": "", "card": "", "job": spec.model_dump(mode="json")}
    asked = _process.ExportSpec(format="gguf", types=("F32",), model=ref, base=spec.model, **known)
    found = _process.export(asked, tmp_path / "out", _process.Reporter(tmp_path / "progress"))
    (line,) = found["parity"]["lines"]
    assert found["fault"] is None and line["identical"] == line["prompts"] and line["kl"] < 1e-3, line


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "said"), [("e", "has a token for"), ("a<|im_end|>", "contains the special token"), ("<|im_end|>", "has a token for")]
)
def test_a_tokenizer_refuses_what_it_has_or_needs(token: str, said: str) -> None:
    with pytest.raises(BadData, match=said):
        new_tokens.add_to(build_tokenizer(), [token])


def test_a_second_table_of_the_vocabulary_is_refused(tiny_model: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_model)
    model.model.further = torch.nn.Embedding(512, 8)
    with pytest.raises(BadData, match=r"second table of its vocabulary \(model\.further\)"):
        new_tokens.widen(model, new_tokens.add_to(build_tokenizer(), WORDS))


def test_a_folder_that_was_changed_is_not_loaded(data_dir: Path, tiny_model: Path) -> None:
    spec = spec_of(tiny_model, validation_fraction=0)
    said = run(spec, data_dir)
    folder = data_dir / said[-1].path
    assert NEW_TOKENS in manifest.read(folder)["files"]
    shutil.copy(folder / "adapter_model.safetensors", folder / NEW_TOKENS)
    with pytest.raises(BadModel, match=NEW_TOKENS):
        load_model(tuned(spec, said))
