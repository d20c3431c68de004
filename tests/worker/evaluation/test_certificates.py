"""Models of any architecture come in by what is found in them: their shape, and a certificate of what was tried."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from uuid import UUID, uuid4

import numpy as np
import pytest
import torch
from sqlalchemy import select
from transformers import AutoModelForCausalLM

from app import queue
from app.datasets.service import DatasetStats
from app.db import transaction
from app.errors import Unsupported
from app.machines.hardware import Machine, Pace
from app.models import imports
from app.planning import duration
from app.planning.memory import layer_bytes
from app.shapes import STRUCTURE, Shape, shape_of
from app.spec import DatasetRef, ModelRef
from app.strategies import STRATEGIES
from app.tables import Outbox
from benchmarks.architectures import small_model, write_small
from tests.factories import make_dataset, make_spec
from tests.worker.inference.test_engine import PROMPTS, by_transformers, crowd, request, run
from tests.worker.orders import order as make_order
from tests.worker.orders import put_dataset
from tests.worker.training.test_classification import run as classify
from tests.worker.training.test_classification import sorting, texts, tuned_ref
from worker.conversion import trial
from worker.conversion.structure import shape_of_model
from worker.data.batching import Row
from worker.evaluation.certificate import certify
from worker.inference.engine import Engine
from worker.inference.model_pool import ModelPool
from worker.modeling import new_tokens, padded
from worker.modeling.classifier import load_backbone, load_classifier
from worker.modeling.loading import load_tokenizer
from worker.modeling.packed_attention import NAME, packed
from worker.runtime.device import choose
from worker.train import train
from worker.training.objectives import objective_of
from worker.training.objectives.classification import probabilities, tokenise_texts
from worker.training.schedule import course_of

STATS = DatasetStats(rows=100, characters=20_000, tokens=5000, trained_tokens=2500, longest=60)
DATA = DatasetRef(id=UUID(int=1), name="rows", path="rows", sha256="", format="chat", rows=100)


def meta_model(kind: str):
    with torch.device("meta"):
        model = small_model(kind)
    if model.get_output_embeddings() is not None:
        model.tie_weights()
    return model


def kept(kind: str, folder: Path) -> Shape:
    """A small model in `folder` as an import leaves it."""
    write_small(kind, folder)
    config = json.loads((folder / "config.json").read_text())
    shape = trial.read_shape(config)
    (folder / "config.json").write_text(json.dumps({**config, STRUCTURE: shape.model_dump(mode="json")}))
    return shape


@pytest.mark.parametrize(
    "kind", ["gpt2", "gpt_neox", "opt", "phi", "phi3", "gemma2", "mixtral", "olmo2", "starcoder2", "cohere", "granite"]
)
def test_every_parameter_is_counted_once_and_in_its_place(kind: str) -> None:
    model = meta_model(kind)
    shape = shape_of_model(model)
    found = shape.structure
    assert found is not None and shape.parameters() == sum(weight.numel() for weight in model.parameters())
    blocks = sum(block.parameters for block in found.layers())
    assert blocks + found.embedding + found.final_norm_parameters + found.head == shape.parameters()
    assert all(isinstance(model.get_submodule(name), torch.nn.Module) for name, _ in shape.modules())
    assert shape.layers == 2 and found.final_norm and shape.top_parameters(1) == blocks // 2
    assert shape_of({"model_type": kind, STRUCTURE: shape.model_dump(mode="json")}) == shape


def test_layers_may_have_widths_of_their_own() -> None:
    """Of Gemma 4: the layers that read everything have wider heads, and transformers says no width of them all."""
    model = meta_model("gemma4_text")
    shape = shape_of_model(model)
    widest = max(layer.head_dim for layer in model.config.per_layer_config)
    assert shape.structure is not None and len(shape.structure.kinds) == 2 and shape.head_dim == widest
    assert shape.structure.final_norm == "model.norm"
    assert shape.parameters() == sum(weight.numel() for weight in model.parameters())


def test_a_shape_with_formulas_has_the_counts_of_one_that_was_read() -> None:
    model = meta_model("qwen3")
    read, known = shape_of_model(model), shape_of(model.config.to_dict())
    assert known.structure is None
    for name in ("parameters", "norm_parameters", "layer_parameters", "embedding_parameters", "body_parameters", "matmul_parameters"):
        assert getattr(read, name)() == getattr(known, name)(), name
    for strategy in (kind() for kind in STRATEGIES.values() if kind.any_architecture and kind.recipe == "gradient"):
        assert strategy.trainable(read) == strategy.trainable(known), strategy.name


@pytest.mark.parametrize("kind", ["distilbert", "modernbert", "deberta-v2", "electra", "camembert"])
def test_an_encoders_parameters_are_counted_too(kind: str) -> None:
    model = meta_model(kind)
    shape = shape_of_model(model, "encoder")
    found = shape.structure
    assert found is not None and shape.architecture == "encoder" and shape.parameters() == sum(w.numel() for w in model.parameters())
    assert (
        sum(block.parameters for block in found.layers()) + found.embedding + found.final_norm_parameters + found.head == shape.parameters()
    )
    pooler = getattr(model, "pooler", None)
    assert shape.body_parameters() == shape.parameters() - (sum(w.numel() for w in pooler.parameters()) if pooler else 0)
    assert all(isinstance(model.get_submodule(name), torch.nn.Linear) for name, _ in shape.modules())


@pytest.mark.parametrize("kind", ["gpt2", pytest.param("mixtral", marks=pytest.mark.long), pytest.param("opt", marks=pytest.mark.long)])
def test_a_certificate_says_what_was_tried(kind: str, tmp_path: Path) -> None:
    found = certify(tmp_path, kept(kind, tmp_path))
    assert found["tier"] == "B" and [check["name"] for check in found["checks"]] == [
        "weights",
        "packed",
        "loss",
        "cached",
        "step",
        "new_tokens",
    ]
    assert all(check["passed"] for check in found["checks"]), found["checks"]
    works = {name for name, told in found["strategies"].items() if told["works"]}
    assert {"lora", "dora", "full", "top_layers", "layer_norm"} <= works, found["strategies"]
    assert not {"prefix_tuning", "ia3", "bottleneck_adapter"} & found["strategies"].keys(), "their places in it are not known"
    for name, told in found["strategies"].items():
        assert told["works"] or told["message"], name


@pytest.mark.parametrize("kind", ["llama4_text", pytest.param("deepseek_v3", marks=pytest.mark.long)])
def test_adapters_stand_next_to_plain_layers_alone(kind: str, tmp_path: Path) -> None:
    """Llama 4's router is a linear layer that answers with two tensors; of DeepSeek's dense layers peft takes the names to mean the experts."""
    shape = kept(kind, tmp_path)
    names = {linear.name.rpartition(".")[2] for linear in shape.linears()}
    assert names.isdisjoint({"router", "gate_proj"} if kind == "deepseek_v3" else {"router"}) and "o_proj" in names
    found = certify(tmp_path, shape)
    refused = {name for name, told in found["strategies"].items() if not told["works"]}
    assert found["tier"] == "B" and refused <= {"oft"}, found["strategies"]


def test_one_whose_answers_the_cache_would_change_is_read_whole(tmp_path: Path) -> None:
    """CodeGen attends by itself: its packs are right, and the engine's cache of keys is not asked."""
    found = certify(tmp_path, kept("codegen", tmp_path))
    assert found["tier"] == "C" and [check["name"] for check in found["checks"] if not check["passed"]] == ["cached"]
    assert found["strategies"]["lora"]["works"]


@pytest.mark.long
def test_ranks_are_decided_where_an_expert_got_no_token(tmp_path: Path) -> None:
    found = certify(tmp_path, kept("jamba", tmp_path))
    assert found["strategies"]["adalora"]["works"], found["strategies"]["adalora"]


def test_a_config_may_name_infinities(tmp_path: Path) -> None:
    """As transformers writes them, since JSON cannot."""
    write_small("mamba2", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    assert trial.read_shape(config).model_type == "mamba2"


@pytest.mark.parametrize("kind", ["mamba", pytest.param("bloom", marks=pytest.mark.long)], ids=["by its recurrence", "by its positions"])
def test_one_whose_texts_would_see_each_other_gets_padded_batches(kind: str, tmp_path: Path) -> None:
    found = certify(tmp_path, kept(kind, tmp_path))
    assert found["tier"] == "C" and [(check["name"], check["passed"]) for check in found["checks"]] == [
        ("weights", True), ("packed", False), ("padded", True), ("loss", True), ("step", True),
        ("new_tokens", True),
    ]  # fmt: skip
    works = {name for name, told in found["strategies"].items() if told["works"]}
    assert {"lora", "full", "top_layers", "prompt_tuning"} <= works, found["strategies"]


@pytest.mark.parametrize(("kind", "near"), [("gpt2", 0.1), ("mamba", 0.15)])
def test_memory_and_time_follow_from_a_measured_step(kind: str, near: float, tmp_path: Path, data_dir: Path) -> None:
    """What a LoRA step over other rows keeps is what the estimate says, which by the formula it is not."""
    from tests.worker.training.test_memory import Holding

    shape = kept(kind, tmp_path)
    certificate = certify(tmp_path, shape)
    tiered = {"step": certificate["step"], "packs": certificate["tier"] == "B"}
    known = Shape.model_validate({**shape.model_dump(), "structure": {**shape.structure.model_dump(), **tiered}})
    strategy = STRATEGIES["lora"]()
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=NAME if known.structure.packs else None)
    if known.pads:
        padded.pad_packs(model)
    model = strategy.attach(model).train()
    ids, held = torch.arange(4, 100)[None], Holding(model)
    with held:
        given = packed(ids[0].numpy(), [48, 48], torch.device("cpu"))
        states = model.get_base_model().get_decoder()(**given, use_cache=False).last_hidden_state
    assert states.requires_grad
    said, by_formula = (96 * known.layers * layer_bytes(s, strategy, False, False, longest=48)[0] for s in (known, shape))
    assert said == pytest.approx(held.bytes, rel=near), (said, by_formula, held.bytes, certificate["step"])
    spec = make_order(ModelRef(id=uuid4(), name=kind, kind="generic", path="", revision="", shape=known), DATA)
    alone = Machine(cores=known.step.threads, memory_bytes=2**34)
    estimated = duration.estimate(spec, STATS, alone)
    work = duration.operations_per_token(known, strategy, duration.loss_share(STATS))
    assert estimated.tokens_per_second == pytest.approx(known.step.operations_per_second / work)
    own = {f"{alone.device} · lora · decoder {kind} · gradient · fp32": Pace(operations_per_second=7e9, fixed_seconds=1)}
    others = {f"{alone.device} · lora · decoder · gradient · fp32": Pace(operations_per_second=8e9, fixed_seconds=1)}
    assert duration.speed_of(spec, alone.model_copy(update={"paces": own | others})) == 7e9
    assert duration.speed_of(spec, alone.model_copy(update={"paces": others})) == known.step.operations_per_second, (
        "others say nothing of it"
    )


def test_new_tokens_that_would_not_learn_are_found_when_a_model_is_added(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(new_tokens, "_with_gradient", lambda layer, given, out: out)
    (check,) = [check for check in certify(tmp_path, kept("gpt2", tmp_path))["checks"] if check["name"] == "new_tokens"]
    assert not check["passed"] and check["value"] > check["bound"] and "they differ by" in check["message"]


def test_a_pack_of_one_that_is_padded_holds_what_padding_takes_too(tmp_path: Path, data_dir: Path) -> None:
    """A long row beside short ones would become a batch many times as large."""
    shape = kept("mamba", tmp_path)
    known = Shape.model_validate({**shape.model_dump(), "structure": {**shape.structure.model_dump(), "packs": False}})
    rows = [{"text": "x" * 60}] + [{"text": "x"}] * 40
    ref = ModelRef(id=uuid4(), name="m", kind="generic", path=str(tmp_path), revision="0" * 64, shape=known)
    spec = make_order(ref, put_dataset(rows, "plain_text"), max_tokens_per_step=64, validation_fraction=0)
    lesson = objective_of(spec, load_tokenizer(spec.model))
    plan = course_of(lesson, choose(spec.run, spec.strategy))
    packs = [[lesson.train.lengths[row] for row in pack] for _, _, pack in itertools.islice(plan.packs(lesson), plan.total_steps)]
    assert max(len(pack) * max(pack) for pack in packs) <= 64 and max(map(len, packs)) > 5


def test_one_that_is_wrong_in_padded_batches_too_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="cannot be trained: a padded batch"):
        certify(tmp_path, kept("cpmant", tmp_path))


def test_weights_that_are_not_there_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shape = kept("gpt2", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in weights if "c_fc.weight" in name)
    save_file({name: value for name, value in weights.items() if name != lost}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(Unsupported, match=r"lack 1 of the model's tensors.*c_fc"):
        certify(tmp_path, shape)
    save_file({**weights, lost: weights[lost] * float("nan")}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(Unsupported, match="not a number"):
        certify(tmp_path, shape)


@pytest.mark.long
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "no_such_thing"}, "not one that the installed transformers"),
        ({"n_embd": 63}, "No language model can be made"),
        ({"to_dict": "no"}, "which is no setting"),
        ({"n_layer": 2000}, "layers"),
    ],
)
def test_a_config_that_makes_no_model_is_refused_in_words(change: dict, says: str, tmp_path: Path) -> None:
    write_small("gpt2", tmp_path)
    with pytest.raises(Exception, match=says) as caught:
        trial.read_shape({**json.loads((tmp_path / "config.json").read_text()), **change})
    assert caught.value.hint


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "tier", "stack"), [pytest.param("gpt_neox", "B", "gpt_neox.layers", marks=pytest.mark.fault), ("falcon", "C", "transformer.h")]
)
def test_a_folder_of_another_architecture_becomes_a_model_that_trains_and_answers(
    kind: str, tier: str, stack: str, session, user, data_dir: Path
) -> None:
    write_small(kind, data_dir / "import" / "small")
    model = imports.add_folder(session, user, "small")
    assert model.shape is None
    session.commit()
    imports.fetch(model.id)
    session.refresh(model)
    assert (model.status, model.error, model.certificate["tier"]) == ("ready", None, tier)
    assert json.loads((data_dir / str(model.path) / "config.json").read_text())[STRUCTURE]["structure"]["stack"] == stack
    data = make_dataset(session, user, data_dir)
    model.kind = "generic"
    spec = make_spec(model, data, {"name": "lora"}, epochs=3, micro_batches=1)
    losses = [event.loss for event in train(spec, data_dir / "runs" / "x" / "a1") if event.type == "step"]
    assert losses[-1] < losses[0]
    assert ModelRef.model_validate(spec.model.model_dump()).shape == Shape.model_validate(model.shape)
    prompts = [prompt[:60] for prompt in PROMPTS]  # such a model reads 128 tokens
    expected = [[by_transformers(data_dir / str(model.path), prompt)] for prompt in prompts]
    requests = [request(spec.model, prompt, owner=i) for i, prompt in enumerate(prompts)]
    engine = Engine(ModelPool(device="cpu"), chunk=7, lone_chunk=11)
    assert [run(engine, one)[0] for one in requests] == expected
    assert crowd(engine, requests) == expected
    engine.close()


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "tier"), [pytest.param("distilbert", "B", marks=pytest.mark.fault), ("modernbert", "B"), ("deberta-v2", "C")]
)
def test_an_encoder_of_another_architecture_classifies(kind: str, tier: str, session, user, data_dir: Path) -> None:
    write_small(kind, data_dir / "import" / "small")
    model = imports.add_folder(session, user, "small")
    session.commit()
    imports.fetch(model.id)
    session.refresh(model)
    assert (model.status, model.error, model.kind, model.certificate["tier"]) == ("ready", None, "encoder", tier)
    assert not [name for name, told in model.certificate["strategies"].items() if not told["works"]], model.certificate["strategies"]
    ref = ModelRef(id=model.id, name=model.name, kind=model.kind, path=model.path, revision=model.revision, shape=model.shape)
    spec = sorting(ref, texts(), settings={"layers": "feed-forward"}, epochs=12)
    said = classify(spec, data_dir)
    losses = [event.loss for event in said if event.type == "step"]
    assert losses[-1] < 0.5 * losses[0]
    classifier, labels = load_classifier(tuned_ref(spec, said[-1]), attention=NAME)
    engine = choose(spec.run, spec.strategy, {})
    asked = [tokenise_texts(load_tokenizer(ref), [Row(i, row)], 64) for i, row in enumerate(texts(6))]
    alone = [probabilities(classifier, one, 64, engine)[0] for one in asked]
    together = probabilities(
        classifier, tokenise_texts(load_tokenizer(ref), [Row(i, row) for i, row in enumerate(texts(6))], 64), 400, engine
    )
    assert together == pytest.approx(np.array(alone), abs=1e-4), "texts of a pack see nothing of each other"
    assert [labels[at] for at in together.argmax(1)] == [row["label"] for row in texts(6)]


def test_an_encoder_of_tier_c_keeps_its_own_attention(data_dir: Path) -> None:
    """Longformer makes its windows from a mask, which the packed attention gives to none."""
    shape = kept("longformer", data_dir / "models" / "windows")
    assert shape.structure is not None
    padded_shape = shape.model_copy(update={"structure": shape.structure.model_copy(update={"packs": False})})
    ref = ModelRef(id=uuid4(), name="windows", kind="encoder", path="models/windows", revision="r", shape=padded_shape)
    model = load_backbone(ref, attention=NAME)
    ids = list(range(4, 44))
    with torch.no_grad():
        together = model(**packed(ids, [30, 10], torch.device("cpu"))).last_hidden_state[0, 30:40]
        alone = model(input_ids=torch.tensor([ids[30:]])).last_hidden_state[0]
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)


@pytest.mark.long
def test_a_certificate_is_renewed_when_transformers_moves(session, user, data_dir: Path) -> None:
    write_small("falcon", data_dir / "import" / "small")
    model = imports.add_folder(session, user, "small")
    session.commit()
    imports.fetch(model.id)
    session.refresh(model)
    with transaction() as other:
        imports.reap(other)
    due = select(Outbox.key).where(Outbox.task == queue.EXAMINE)
    assert session.scalars(due).all() == [], "it was tried with what is installed"
    model.certificate = {**model.certificate, "versions": {"transformers": "4.0.0"}, "checks": []}
    session.commit()
    with transaction() as other:
        imports.reap(other)
    assert session.scalars(due).all() == [model.id]
    imports.examine(model.id)
    session.refresh(model)
    assert model.status == "ready" and model.certificate["versions"]["transformers"] == imports.INSTALLED and model.certificate["checks"]
    assert Shape.model_validate(model.shape).structure.packs is False
