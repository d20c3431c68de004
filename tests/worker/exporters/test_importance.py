"""The importance matrix: the inputs of every matrix on training rows, and files that are nearer to the model where inputs are large."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.worker.exporters.models import build
from tests.worker.exporters.test_parity import ROWS
from worker import exporters
from worker.data.chat_template import render_row
from worker.exporters import _importance
from worker.exporters._base import ExportOptions


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("importance") / "m", "llama", hidden_size=256, num_hidden_layers=2, head_dim=64)


def test_it_is_the_mean_square_of_the_inputs(model: Path):
    steps: list[float] = []
    found = _importance.measure(model, "dialogue", ROWS, steps.append)
    assert steps[-1] == 1 and all((values > 0).all() for values in found.values())
    weights = load_file(model / "model.safetensors")
    assert {name for name, tensor in weights.items() if tensor.ndim == 2} <= found.keys()
    assert all(found[name].shape == (weights[name].shape[1],) for name in weights if weights[name].ndim == 2)
    tokenizer, plain = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    seen = []
    plain.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    with torch.inference_mode():
        for row in ROWS:
            plain(torch.tensor([render_row(tokenizer, row, "dialogue", 512).ids]))
    expected = torch.cat(seen).pow(2).mean(0).numpy()
    assert np.allclose(found["lm_head.weight"], expected, rtol=1e-4) and found["model.embed_tokens.weight"] is found["lm_head.weight"]
    assert _importance.measure(model, "dialogue", [{"messages": []}]) == {}


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q4_0", "IQ4_XS"])
def test_a_file_is_nearer_to_the_model_where_inputs_are_large(model: Path, tmp_path: Path, kind: str):
    measured = _importance.measure(model, "dialogue", ROWS)
    np.savez(tmp_path / "importance.npz", **measured)
    weights = load_file(model / "model.safetensors")
    errors = []
    for given in ("", str(tmp_path / "importance.npz")):
        into = tmp_path / f"out{bool(given)}"
        into.mkdir()
        options = ExportOptions(name="t", types=(kind,), importance=given)
        (made,) = exporters.get("gguf").write(model, into, options, lambda *_: None)
        assert any("importance matrix" in note for note in made.notes) == bool(given)
        total = 0.0
        for tensor in gguf.GGUFReader(into / made.name).tensors:
            if tensor.name.endswith(("ffn_up.weight", "ffn_down.weight")):
                part = "up_proj" if "up" in tensor.name else "down_proj"
                name = f"model.layers.{tensor.name.split('.')[1]}.mlp.{part}.weight"
                apart = gguf.quants.dequantize(tensor.data, tensor.tensor_type) - weights[name]
                total += float((apart**2 * measured[name]).sum() / (weights[name] ** 2 * measured[name]).sum())
        errors.append(total)
    assert errors[1] < errors[0], errors
