"""Folders for transformers and peft: their weights, their dtypes, their shards, and that they answer as the model does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from app.errors import BadData, Unsupported
from app.export_formats import FORMATS, ModelFacts
from app.shapes import shape_of
from tests.models.test_service import tune_by_hand
from tests.worker.exporters.models import build
from tests.worker.exporters.test_parity import causes, ours
from worker import exporters
from worker.exporters import _folder, _parity
from worker.exporters._base import ExportOptions, WrittenFile


def write(folder: Path, into: Path, *types: str) -> list[WrittenFile]:
    into.mkdir()
    steps: list[float] = []
    made = exporters.get("safetensors").write(folder, into, ExportOptions(name="t", types=types), lambda share, _: steps.append(share))
    assert steps == sorted(steps) and steps[-1] == pytest.approx(1)
    assert sorted(one.name for one in made) == sorted(p.relative_to(into).as_posix() for p in into.rglob("*") if p.is_file())
    return list(made)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("folders") / "m", "llama", num_hidden_layers=2)


def test_every_type_has_its_dtype_and_answers_as_the_model(model: Path, tmp_path: Path):
    expected = ours(model)
    made = write(model, tmp_path / "out", "BF16", "F32")
    exporter, options = exporters.get("safetensors"), ExportOptions(name="t", types=("BF16", "F32"))
    runs = {one.type: run for one in made if (run := exporter.run(tmp_path / "out", one, tmp_path, options))}
    assert {kind: run.file.name for kind, run in runs.items()} == {"BF16": "BF16", "F32": "F32"}
    for kind, dtype in (("BF16", torch.bfloat16), ("F32", torch.float32)):
        weights = load_file(runs[kind].file / "model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {dtype}
        assert json.loads((runs[kind].file / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
        line = _parity.report(kind, runs[kind].file, expected, _parity.run_folder(runs[kind].file, expected))
        assert line["faults"] == [] and line["identical"] == line["prompts"] == 3, line
        assert line["kl"] < (1e-6 if kind == "F32" else 0.01) and line["bytes"] > 10_000 and line["tokens_per_second"] > 1


def test_large_weights_are_sharded_and_load_as_one_model(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_folder, "SHARD_BYTES", 100_000)
    made = write(model, tmp_path / "out", "F32")
    shards = [one.name for one in made if one.name.endswith(".safetensors")]
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    before = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert index["metadata"]["total_size"] == sum(t.nbytes for name in shards for t in load_file(tmp_path / "out" / name).values())
    write(tmp_path / "out", tmp_path / "again", "BF16")  # from shards


def test_a_weight_that_exceeds_a_type_is_refused(tmp_path: Path):
    folder = build(tmp_path / "m", "llama", num_hidden_layers=1)
    large = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        large.model.layers[0].mlp.up_proj.weight[3, 5] = 1e6
    large.save_pretrained(folder)
    with pytest.raises(Unsupported, match=r"mlp\.up_proj\.weight exceeds the range of torch\.float16"):
        write(folder, tmp_path / "out", "F16")


def test_a_folder_that_answers_otherwise_is_found(model: Path, tmp_path: Path):
    expected = ours(model)
    for name, change, cause in (
        ("chat_template.jinja", lambda text: text.replace("'<|im_end|>' + '\n'", "'<|im_end|>'"), "template"),
        ("generation_config.json", lambda text: json.dumps({**json.loads(text), "eos_token_id": 0}), "end"),
    ):
        write(model, tmp_path / cause, "F32")
        path = tmp_path / cause / name
        path.write_text(change(path.read_text()))
        assert causes(_parity.report("F32", path.parent, expected, _parity.run_folder(path.parent, expected))) == [cause]


def test_the_tokens_that_end_an_answer_are_in_the_generation_config(model: Path, tmp_path: Path):
    bare = tmp_path / "bare"
    bare.mkdir()
    _folder.copy_others(model, bare, lambda name: name == "generation_config.json")
    assert not (bare / "generation_config.json").exists() and (bare / "model.safetensors").is_file()
    write(bare, tmp_path / "out", "F32")
    assert 2 in json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]


# Adapters -------------------------------------------------------------------------------------------------------------


def test_an_adapter_loads_in_peft_and_names_its_base(model: Path, tmp_path: Path):
    from peft import PeftModel

    adapter = tune_by_hand(tmp_path / "adapter", model)
    into = tmp_path / "out"
    into.mkdir()
    options = ExportOptions(name="a", types=("PEFT",), base="lab/base")
    made = exporters.get("adapter").write(adapter, into, options, lambda *_: None)
    assert {one.name for one in made} == {path.name for path in into.iterdir()} >= {"adapter_config.json", "tokenizer.json"}
    assert json.loads((into / "adapter_config.json").read_text())["base_model_name_or_path"] == "lab/base"
    ids = torch.tensor([[5, 9, 40, 7]])
    answers = []
    for folder in (adapter, into):
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), folder)
        answers.append(loaded(ids).logits)
    assert torch.equal(*answers)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(BadData, match=r"no adapter_model\.safetensors"):
        exporters.get("adapter").write(adapter, into, options, lambda *_: None)


def test_only_one_adapter_of_pefts_is_an_adapter(model: Path):
    shape = shape_of(json.loads((model / "config.json").read_text()))
    accepts = FORMATS["adapter"].accepts
    assert accepts(ModelFacts("a", "dialogue", shape, strategies=("lora",), peft=True)) is None
    assert accepts(ModelFacts("a", "dialogue", shape)) == "It is not an adapter."
    assert "lora on ia3" in str(accepts(ModelFacts("a", "dialogue", shape, strategies=("ia3", "lora"), peft=True)))
    assert "no layout for what bitfit trains" in str(accepts(ModelFacts("a", "dialogue", shape, strategies=("bitfit",))))
