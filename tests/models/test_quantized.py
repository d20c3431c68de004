"""Checkpoints with 8-bit weights: their weights are written out in bf16, and are those that transformers computes with."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from app.errors import BadData, Unsupported
from app.kit import ids
from app.models import import_checks, imports
from app.models.quantized import scheme_of
from app.settings import get_settings
from worker.conversion import convert, dequantize

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32], "modules_to_not_convert": ["lm_head"]}
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}
GROUPS = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}}}
PACKED = {"quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed", **GROUPS}
PROMPT = torch.tensor([[5, 90, 210, 33, 400, 7]])


def quantize(model: Path, folder: Path, config: dict, store) -> Path:
    """The small model with every linear layer of its blocks stored by `store(name, weight) -> {tensor: value}`."""
    shutil.copytree(model, folder)
    found = load_file(folder / "model.safetensors")
    weights: dict[str, torch.Tensor] = {}
    for name, weight in found.items():
        weights |= store(name, weight) if name.endswith("_proj.weight") else {name: weight.to(torch.bfloat16)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, "dtype": "bfloat16", "quantization_config": config}))
    return folder


def in_blocks(size: int):
    """fp8 with a scale for each block of `size` rows and columns, the last of which may be smaller."""

    def store(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        rows, columns = weight.shape
        scales = torch.empty(-(-rows // size), -(-columns // size))
        stored = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                place = slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size)
                scales[i, j] = weight[place].abs().max() / 448
                stored[place] = (weight[place] / scales[i, j]).to(torch.float8_e4m3fn)
        return {name: stored, f"{name}_scale_inv": scales, name.replace("weight", "activation_scale"): torch.ones(1)}

    return store


def by_rows(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """int8 of compressed-tensors with a scale and a zero point for each row."""
    low, high = weight.min(1, keepdim=True).values, weight.max(1, keepdim=True).values
    scale = (high - low) / 255
    zero = (-128 - low / scale).round()
    stored = (weight / scale + zero).round().clamp(-128, 127).to(torch.int8)
    return {
        name: stored,
        f"{name}_scale": scale,
        f"{name}_zero_point": zero.to(torch.int8),
        name.replace("weight", "input_scale"): scale[:1].clone(),
    }


def added(folder: Path, into: Path) -> dict:
    into.mkdir()
    return convert.from_folder(folder, into)


def logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True).float().eval()
    with torch.no_grad():
        return model(PROMPT).logits


def test_blocks_of_fp8_give_what_transformers_computes_with(tiny_model: Path, tmp_path: Path) -> None:
    stored = quantize(tiny_model, tmp_path / "fp8", FP8, in_blocks(32))
    facts = added(stored, tmp_path / "kept")
    assert facts["dequantized"] == "fp8, blocks of 32 × 32" and facts["parameters"] > 0
    found = load_file(tmp_path / "kept" / "model.safetensors")
    assert found.keys() == load_file(tiny_model / "model.safetensors").keys()
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "kept" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    assert torch.equal(logits(tmp_path / "kept"), logits(stored)), "transformers dequantizes the stored one itself where there is no GPU"


def test_blocks_that_do_not_divide_the_weight(tiny_model: Path, tmp_path: Path) -> None:
    stored = quantize(tiny_model, tmp_path / "fp8", {**FP8, "weight_block_size": [48, 48]}, in_blocks(48))
    added(stored, tmp_path / "kept")
    found, exact = load_file(tmp_path / "kept" / "model.safetensors"), load_file(tiny_model / "model.safetensors")
    for name, weight in exact.items():
        assert float((found[name].float() - weight).abs().max()) <= float(weight.abs().max()) / 14, name


def test_rows_of_compressed_tensors_with_zero_points(tiny_model: Path, tmp_path: Path) -> None:
    stored = quantize(tiny_model, tmp_path / "int8", PACKED, by_rows)
    assert added(stored, tmp_path / "kept")["dequantized"] == "int-quantized of compressed-tensors"
    found, exact = load_file(tmp_path / "kept" / "model.safetensors"), load_file(tiny_model / "model.safetensors")
    for name, weight in exact.items():
        assert float((found[name].float() - weight).abs().max()) <= float(weight.abs().max()) / 90, name
    name = "model.layers.0.mlp.up_proj.weight"
    raw = load_file(stored / "model.safetensors")
    expected = (raw[name].float() - raw[f"{name}_zero_point"].float()) * raw[f"{name}_scale"]
    assert torch.equal(found[name], expected.to(torch.bfloat16))


@pytest.mark.long
@pytest.mark.skipif(PathFinder.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_int8_of_bitsandbytes_as_transformers_writes_it(tiny_model: Path, tmp_path: Path) -> None:
    """In a child, since this process runs without bitsandbytes where there is no GPU."""
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as M, BitsAndBytesConfig as B\n"
        "m = M.from_pretrained(sys.argv[1], dtype=torch.float32, quantization_config=B(load_in_8bit=True), device_map={'': 'cpu'})\n"
        "m.save_pretrained(sys.argv[2]); m.dequantize(torch.float32)\n"
        "from safetensors.torch import save_file\n"
        "save_file({n: p.detach().float().contiguous() for n, p in m.named_parameters()}, sys.argv[3])\n"
    )
    stored, plain = Path(shutil.copytree(tiny_model, tmp_path / "int8")), tmp_path / "plain.safetensors"
    (stored / "model.safetensors").unlink()
    subprocess.run([sys.executable, "-c", code, str(tiny_model), str(stored), str(plain)], check=True, timeout=300)
    assert any(tensor.dtype == torch.int8 for tensor in load_file(stored / "model.safetensors").values())
    assert added(stored, tmp_path / "kept")["dequantized"] == "int8 of bitsandbytes"
    found, expected = load_file(tmp_path / "kept" / "model.safetensors"), load_file(plain)
    for name, weight in expected.items():
        assert torch.allclose(found[name].float(), weight, rtol=2**-8, atol=0), name


def test_shards_are_read_across_and_written_as_several(tiny_model: Path, tmp_path: Path, monkeypatch) -> None:
    whole = quantize(tiny_model, tmp_path / "whole", FP8, in_blocks(32))
    parts = Path(shutil.copytree(whole, tmp_path / "parts"))
    weights = load_file(parts / "model.safetensors")
    (parts / "model.safetensors").unlink()
    scales = {name: tensor for name, tensor in weights.items() if name.endswith("_scale_inv")}
    places = {}
    for number, some in enumerate(({n: t for n, t in weights.items() if n not in scales}, scales), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file(some, parts / file, metadata={"format": "pt"})
        places |= dict.fromkeys(some, file)
    (parts / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    monkeypatch.setattr(dequantize, "PART_BYTES", 40_000)
    added(parts, tmp_path / "kept")
    assert len(list((tmp_path / "kept").glob("model-*.safetensors"))) > 1
    assert torch.equal(logits(tmp_path / "kept"), logits(whole))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantized by gptq"),
        ({"quant_method": "awq"}, "quantized by awq"),
        ({"quant_method": "mxfp4"}, "quantized by mxfp4"),
        ({"bits": 4}, "an unnamed method"),
        ("fp8", "not an object"),
        ({**INT8, "load_in_8bit": False, "load_in_4bit": True}, "bitsandbytes in 4 bits"),
        ({**FP8, "expert_dtype": "fp4"}, "4 bits"),
        ({**FP8, "weight_block_size": [0, 128]}, "not two numbers"),
        ({**FP8, "weight_block_size": "128"}, "not two numbers"),
        ({**PACKED, "format": "pack-quantized"}, "as pack-quantized"),
        ({**PACKED, "config_groups": {"a": {"weights": {"num_bits": 4}}}}, "not in 8 bits"),
        ({**PACKED, "config_groups": 7}, "not in 8 bits"),
        ({**PACKED, "sparsity_config": {"format": "sparse-24-bitmask"}}, "compressed-tensors"),
    ],
)
def test_what_is_not_read_is_refused_with_the_reason(tiny_model: Path, config: object, said: str) -> None:
    with pytest.raises(Unsupported, match=said) as caught:
        import_checks.check_config({**json.loads((tiny_model / "config.json").read_text()), "quantization_config": config})
    assert "unquantized version" in caught.value.hint


def test_a_scale_that_lies_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    def spoiled(change):
        def store(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
            found = in_blocks(32)(name, weight)
            return change(name, found) if "layers.0.mlp.up_proj" in name else found

        return store

    def lone(name, found):
        return {f"{name}_scale_inv": found[f"{name}_scale_inv"], name: found[name].to(torch.bfloat16)}

    for number, (change, said) in enumerate(
        [
            (lambda name, found: {name: found[name]}, "has 8 bits and no scale"),
            (lambda name, found: {**found, f"{name}_scale_inv": torch.ones(3, 5)}, "do not fit its weight"),
            (lambda name, found: {**found, f"{name}_scale_inv": found[f"{name}_scale_inv"] * float("nan")}, "not a number somewhere"),
            (lone, "belongs to no weight of 8 bits"),
        ]
    ):
        stored = quantize(tiny_model, tmp_path / f"stored{number}", FP8, spoiled(change))
        with pytest.raises(BadData, match=said):
            added(stored, tmp_path / f"kept{number}")
    with pytest.raises(BadData, match="another GPU"):
        rows = quantize(
            tiny_model,
            tmp_path / "turing",
            INT8,
            lambda name, weight: {
                name: weight.to(torch.int8),
                name.replace("weight", "SCB"): weight.abs().amax(1),
                name.replace("weight", "weight_format"): torch.tensor(2, dtype=torch.uint8),
            },
        )
        added(rows, tmp_path / "kept-turing")
    assert scheme_of(INT8).scale_of("a.weight") == "a.SCB"


@pytest.mark.long
def test_one_is_added_through_the_studio_and_its_page_says_so(client, session, user, tiny_model: Path) -> None:
    folder = get_settings().folder("import") / "small-fp8"
    quantize(tiny_model, folder, FP8, in_blocks(32))
    model = imports.add_folder(session, user, "small-fp8")
    session.commit()
    imports.fetch(model.id)
    session.refresh(model)
    assert model.status == "ready", model.error
    assert model.source["dequantized"] == "fp8, blocks of 32 × 32" and model.certificate["tier"] == "A"
    page = client.get(f"/models/{ids.public(ids.MODEL, model.id)}?tab=lineage").text
    assert "stored in 8 bits (fp8, blocks of 32 × 32)" in page
