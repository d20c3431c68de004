"""ONNX files compute what the studio computes, for texts of any length and batches of any size, and a wrong one is not handed out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from app.errors import BadData, Unsupported
from app.export_formats import FORMATS, ModelFacts
from app.shapes import shape_of
from app.strategies import STRATEGIES
from tests.worker.exporters.models import build
from tests.worker.exporters.test_sentence_transformers import encoder  # noqa: F401  (a fixture)
from worker import exporters
from worker.exporters import onnx
from worker.exporters._base import ExportOptions
from worker.modeling.classifier import Classifier, save_classifier
from worker.modeling.loading import STRATEGY_FILE

TEXTS = ["the belly of a violin", "maple", "a violin of spruce the the the a a of violin belly"]


def write(source: Path, into: Path):
    into.mkdir()
    return exporters.get("onnx").write(source, into, ExportOptions(name="e", types=("F32",), generates=False), lambda *_: None)


def run(folder: Path, texts: list[str]) -> np.ndarray:
    import onnxruntime
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "right"
    batch = tokenizer(texts, padding=True, return_tensors="np")
    session = onnxruntime.InferenceSession(str(folder / onnx.FILE))
    return session.run(None, {name: batch[name].astype(np.int64) for name in ("input_ids", "attention_mask")})[0]


def classifier_on(folder: Path, pooling: str, labels: list[str]) -> Classifier:
    """A classifier as it lies in a merged folder."""
    from transformers import AutoModel

    strategy = STRATEGIES["lora"]()
    backbone = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(4)
    made = Classifier(backbone, strategy.head(backbone.config.hidden_size, len(labels)), pooling, labels=labels).eval()
    for parameter in made.head.parameters():
        torch.nn.init.normal_(parameter)
    save_classifier(made, folder, labels)
    (folder / STRATEGY_FILE).write_text(strategy.model_dump_json())
    return made


@pytest.mark.long
def test_vectors_are_those_of_the_studio(encoder: Path, tmp_path: Path):  # noqa: F811
    from transformers import AutoModel, AutoTokenizer

    made = write(encoder, tmp_path / "out")
    assert {one.name for one in made} == {path.name for path in (tmp_path / "out").iterdir()} and not list(
        (tmp_path / "out").glob("*.safetensors")
    )
    note = next(one.notes for one in made if one.name == onnx.FILE)
    assert "no value is farther than" in note[0]
    found = run(tmp_path / "out", TEXTS)
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    tokenizer, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder, dtype=torch.float32).eval()
    for text, vector in zip(TEXTS, found, strict=True):
        with torch.inference_mode():
            mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        assert np.allclose(vector, (mean / mean.norm()).numpy(), atol=1e-5)


@pytest.mark.long
def test_a_classifier_on_an_encoder_gives_the_studios_probabilities(encoder: Path, tmp_path: Path):  # noqa: F811
    check_classifier(encoder, tmp_path / "out", "first")


@pytest.mark.long
def test_a_classifier_on_a_decoder_gives_the_studios_probabilities(tmp_path: Path):
    check_classifier(build(tmp_path / "m", "llama"), tmp_path / "out", "last")


def check_classifier(folder: Path, into: Path, pooling: str) -> None:
    from transformers import AutoTokenizer

    labels = ["delivery", "refund", "größe"]
    made = classifier_on(folder, pooling, labels)
    write(folder, into)
    config = json.loads((into / "config.json").read_text())
    assert config["id2label"] == {"0": "delivery", "1": "refund", "2": "größe"}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text, found in zip(TEXTS, run(into, TEXTS), strict=True):
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.inference_mode():
            expected = made(ids, torch.arange(ids.shape[1])[None], [ids.shape[1]]).softmax(-1)[0]
        assert np.allclose(found, expected.numpy(), atol=1e-5) and found.sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.long
def test_a_file_that_computes_something_else_is_refused(encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    whole = onnx.trace

    def other(module, given, path, output):
        with torch.no_grad():
            module.backbone.embeddings.word_embeddings.weight.mul_(1.1)
        whole(module, given, path, output)

    monkeypatch.setattr(onnx, "trace", other)
    with pytest.raises(BadData, match="computes something else"):
        write(encoder, tmp_path / "out")


def test_without_its_packages_it_says_which(encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    monkeypatch.setattr(onnx, "find_spec", lambda name: None if name == "onnxruntime" else name)
    with pytest.raises(Unsupported, match="onnxruntime is not installed"):
        write(encoder, tmp_path / "out")


def test_only_what_writes_no_text_is_written_in_it(encoder: Path):  # noqa: F811
    shape = shape_of(json.loads((encoder / "config.json").read_text()))
    accepts = FORMATS["onnx"].accepts
    assert accepts(ModelFacts("e", "encoder", shape)) is None and accepts(ModelFacts("c", "classifier", shape, labels=("a", "b"))) is None
    assert "as GGUF" in str(accepts(ModelFacts("d", "dialogue", shape)))
