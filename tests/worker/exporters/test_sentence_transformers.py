"""The folder layout of sentence-transformers, and the vectors that its description means."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from app.export_formats import FORMATS, ModelFacts
from app.shapes import shape_of
from worker import exporters
from worker.exporters._base import ExportOptions


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path / "bert"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "spruce", "maple", "the", "belly", "of", "a", "violin"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(vocab_file=str(tmp_path / "vocab.txt"), model_max_length=48)
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_layout_says_what_the_studio_does(encoder: Path, tmp_path: Path):
    into = tmp_path / "out"
    into.mkdir()
    made = exporters.get("sentence_transformers").write(encoder, into, ExportOptions(name="e", types=("F32",)), lambda *_: None)
    assert {w.name for w in made} == {p.relative_to(into).as_posix() for p in into.rglob("*") if p.is_file()}
    modules = json.loads((into / "modules.json").read_text())
    assert [m["type"].rsplit(".", 1)[-1] for m in modules] == ["Transformer", "Pooling", "Normalize"]
    assert all((into / m["path"]).is_dir() for m in modules)
    pooling = json.loads((into / "1_Pooling" / "config.json").read_text())
    assert pooling["pooling_mode_mean_tokens"] and sum(v is True for v in pooling.values()) == 1
    assert pooling["word_embedding_dimension"] == 32
    assert json.loads((into / "sentence_bert_config.json").read_text())["max_seq_length"] == 48
    assert json.loads((into / "config.json").read_text())["dtype"] == "float32"
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (encoder, into))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_only_embedding_models_have_it(encoder: Path):
    shape = shape_of(json.loads((encoder / "config.json").read_text()))
    accepts = FORMATS["sentence_transformers"].accepts
    assert accepts(ModelFacts("e", "encoder", shape)) is None
    assert "Only embedding models" in str(accepts(ModelFacts("c", "classifier", shape, labels=("a", "b"))))
