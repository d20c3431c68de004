"""LoRA adapters as GGUF, run in llama.cpp on a GGUF file of their base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.errors import Unsupported
from app.export_formats import FORMATS, ModelFacts
from app.shapes import shape_of
from tests.worker.exporters.models import build
from tests.worker.exporters.test_parity import ROWS
from worker import exporters
from worker.exporters import _parity
from worker.exporters._base import ExportOptions


def adapt(base: Path, folder: Path, **config: Any) -> Any:
    """A LoRA adapter with random matrices, saved; the model with it."""
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    torch.manual_seed(5)
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=targets, **config))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    wrapped.save_pretrained(folder)
    return wrapped.eval()


@pytest.mark.long
@pytest.mark.parametrize(("kind", "config"), [("llama", {}), ("gemma3_text", {"use_rslora": True})])
def test_an_adapter_answers_in_llama_cpp_as_here(tmp_path: Path, kind: str, config: dict):
    base = build(tmp_path / "base", kind)
    tuned = adapt(base, tmp_path / "adapter", **config)
    into, work = tmp_path / "out", tmp_path / "work"
    into.mkdir()
    work.mkdir()
    exporter = exporters.get("gguf_adapter")
    options = ExportOptions(name="t", types=("F16",), base_folder=str(base))
    (made,) = exporter.write(tmp_path / "adapter", into, options, lambda *_: None)
    assert made.name == "t-lora-F16.gguf"
    tokenizer = AutoTokenizer.from_pretrained(base)
    plain = lambda: AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()  # noqa: E731
    expected = _parity.reference(lambda: tuned, tokenizer, "dialogue", ROWS, plain)
    what = exporter.run(into, made, work, options)
    right = _parity.report("F16", into / made.name, expected, _parity.run(what.file, expected, work, what.lora))
    assert right["faults"] == [] and right["kl"] < 1e-3, right
    wrong = _parity.report("F16", into / made.name, expected, _parity.run(what.file, expected, work))
    assert [fault["cause"] for fault in wrong["faults"]] == ["adapter"]


def test_what_llama_cpp_does_not_apply_is_refused(tmp_path: Path):
    base = build(tmp_path / "base", "llama", num_hidden_layers=1)
    adapt(base, tmp_path / "dora", use_dora=True)
    options = ExportOptions(name="t", types=("F16",), base_folder=str(base))
    with pytest.raises(Unsupported, match="use_dora"):
        exporters.get("gguf_adapter").write(tmp_path / "dora", tmp_path, options, lambda *_: None)
    shape = shape_of(json.loads((base / "config.json").read_text()))
    accepts = FORMATS["gguf_adapter"].accepts
    assert accepts(ModelFacts("t", "dialogue", shape, strategies=("lora",))) is None
    assert "not an adapter" in str(accepts(ModelFacts("t", "dialogue", shape)))
    assert "this is dora on lora" in str(accepts(ModelFacts("t", "dialogue", shape, strategies=("lora", "dora"))))
