"""GGUF files: their tensors, types and keys. What llama.cpp makes of them is tested in test_parity.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as G

from app.errors import BadData, Unsupported
from app.export_formats import FORMATS
from app.models.gguf_header import check_gguf
from tests.worker.exporters.models import build
from worker import exporters
from worker.exporters._base import ExportOptions
from worker.exporters._gguf_types import FILE_TYPES, Recipe, more_bits
from worker.exporters.gguf import check_config, permuted, rope_factors


def test_every_format_has_its_exporter_and_each_says_the_same():
    assert exporters.names() == sorted(FORMATS)
    for name, described in FORMATS.items():
        found = exporters.get(name)
        assert (found.name, found.title, found.types) == (name, described.title, described.types)


def write(folder: Path, into: Path, *types: str) -> dict[str, gguf.GGUFReader]:
    into.mkdir()
    steps: list[float] = []
    made = exporters.get("gguf").write(folder, into, ExportOptions(name="lab/tiny one", types=types), lambda share, _: steps.append(share))
    assert [w.type for w in made] == list(types) and sorted(p.name for p in into.iterdir()) == sorted(w.name for w in made)
    assert steps == sorted(steps) and steps[-1] == pytest.approx(1)
    return {w.type: gguf.GGUFReader(into / w.name) for w in made}


def value(reader: gguf.GGUFReader, key: str):
    return reader.fields[key].contents()


def test_every_type_is_written_and_reads_back_near_the_weights(tmp_path: Path):
    from safetensors.numpy import load_file

    folder = build(tmp_path / "m", "llama", hidden_size=256, num_hidden_layers=2, head_dim=64)
    weights = load_file(folder / "model.safetensors")
    readers = write(folder, tmp_path / "out", *FORMATS["gguf"].types)
    worst = {}
    for name, reader in readers.items():
        assert check_gguf(next((tmp_path / "out").glob(f"*-{name}.gguf")))["general.file_type"] == FILE_TYPES[name].number
        tensors = {t.name: t for t in reader.tensors}
        assert len(tensors) == len(weights)
        found = gguf.quants.dequantize(tensors["blk.1.ffn_up.weight"].data, tensors["blk.1.ffn_up.weight"].tensor_type)
        expected = weights["model.layers.1.mlp.up_proj.weight"]
        worst[name] = float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))
        assert {t.tensor_type for t in tensors.values() if "norm" in t.name} == {G.F32}
    assert worst["F32"] == 0 and worst["F16"] < 1e-3 and worst["BF16"] < 5e-3 and worst["Q8_0"] < 0.01
    assert worst["Q6_K"] < 0.02 < worst["Q5_K_M"] < 0.05 < worst["Q4_K_M"] < 0.1 and worst["IQ4_XS"] < worst["Q4_0"] < 0.12


def test_llamas_query_rows_change_places_and_gemmas_norms_are_one_more(tmp_path: Path):
    from safetensors.numpy import load_file

    llama, gemma = build(tmp_path / "l", "llama"), build(tmp_path / "g", "gemma3_text")
    found = {t.name: t.data for t in write(llama, tmp_path / "lo", "F32")["F32"].tensors}
    weights = load_file(llama / "model.safetensors")
    q, k = weights["model.layers.0.self_attn.q_proj.weight"], weights["model.layers.0.self_attn.k_proj.weight"]
    assert np.array_equal(found["blk.0.attn_q.weight"], permuted(q, 4)) and not np.array_equal(found["blk.0.attn_q.weight"], q)
    assert np.array_equal(found["blk.0.attn_k.weight"], permuted(k, 2))
    assert np.array_equal(permuted(np.arange(8.0), 2), [0, 2, 1, 3, 4, 6, 5, 7])
    found = {t.name: t.data for t in write(gemma, tmp_path / "go", "F32")["F32"].tensors}
    weights = load_file(gemma / "model.safetensors")
    assert np.array_equal(found["blk.5.attn_q.weight"], weights["model.layers.5.self_attn.q_proj.weight"])
    for ours, theirs in (("blk.3.attn_q_norm", "model.layers.3.self_attn.q_norm"), ("output_norm", "model.norm")):
        assert np.array_equal(found[f"{ours}.weight"], weights[f"{theirs}.weight"] + 1)
    assert "output.weight" not in found, "the embedding is the output too"


def test_keys_say_how_the_model_and_its_tokenizer_work(tmp_path: Path):
    folder = build(tmp_path / "l", "llama", rope_parameters={"rope_theta": 20_000.0, "rope_type": "default"})
    reader = write(folder, tmp_path / "lo", "F16")["F16"]
    assert value(reader, "general.architecture") == "llama" and value(reader, "llama.rope.freq_base") == 20_000
    assert value(reader, "tokenizer.ggml.model") == "gpt2" and value(reader, "tokenizer.ggml.pre") == "gpt-2"
    assert value(reader, "tokenizer.ggml.eos_token_id") == 2 and value(reader, "tokenizer.ggml.add_bos_token") is False
    assert "<|im_start|>" in value(reader, "tokenizer.chat_template") and len(value(reader, "tokenizer.ggml.tokens")) == 512
    assert value(reader, "tokenizer.ggml.token_type")[:3] == [3, 3, 3], "special tokens are control tokens"
    gemma = write(build(tmp_path / "g", "gemma3_text"), tmp_path / "go", "F16")["F16"]
    assert value(gemma, "tokenizer.ggml.model") == "llama" and value(gemma, "tokenizer.ggml.add_space_prefix") is False
    assert value(gemma, "tokenizer.ggml.add_bos_token") is True and value(gemma, "tokenizer.ggml.bos_token_id") == 2
    types, tokens = value(gemma, "tokenizer.ggml.token_type"), value(gemma, "tokenizer.ggml.tokens")
    assert types[tokens.index("<0x41>")] == 6 and types[tokens.index("<unk>")] == 2 and types[tokens.index("<start_of_turn>")] == 3


def test_rows_that_do_not_divide_fall_back_and_it_is_said(tmp_path: Path):
    folder = build(tmp_path / "l", "llama")  # rows of 64, and of 256 in the down projection
    into = tmp_path / "out"
    into.mkdir()
    (made,) = exporters.get("gguf").write(folder, into, ExportOptions(name="t", types=("Q4_K_M",)), lambda *_: None)
    types = {t.name: t.tensor_type for t in gguf.GGUFReader(into / made.name).tensors}
    assert types["blk.1.attn_q.weight"] == G.Q5_0 and types["blk.1.ffn_down.weight"] == G.Q4_K and types["output.weight"] == G.Q8_0
    assert "tensors are Q5_0 in place of Q4_K: their rows are 64 wide, which is no multiple of 256." in " ".join(made.notes)


def test_the_recipe_is_that_of_llama_cpp():
    """A 30-layer file by llama.cpp's quantizer has 4 + 4 + 8 of the larger type in each of the two parts: its first and last eighth
    of the layers, and every third one between."""
    assert [n for n in range(30) if more_bits(n, 30)] == [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29]
    four = Recipe("Q4_K_M", 30, 3, "token_embd.weight")
    assert four.wanted("token_embd.weight") == G.Q6_K and four.wanted("blk.4.ffn_down.weight") == G.Q4_K
    assert (
        four.wanted("blk.5.ffn_down.weight") == four.wanted("blk.5.attn_v.weight") == G.Q6_K
        and four.wanted("blk.5.attn_q.weight") == G.Q4_K
    )
    iq = Recipe("IQ4_XS", 32, 4, "output.weight")
    assert (
        iq.wanted("blk.9.attn_v.weight") == iq.wanted("blk.3.ffn_down.weight") == G.Q5_K and iq.wanted("blk.4.ffn_down.weight") == G.IQ4_XS
    )
    assert iq.wanted("token_embd.weight") == G.IQ4_XS and iq.wanted("output.weight") == G.Q6_K
    assert Recipe("Q4_0", 30, 3, "output.weight").type_of("blk.0.ffn_up.weight", (8, 80)) == (G.F16, G.Q4_0), "80 is no multiple of 32"


CONFIG = {"model_type": "llama", "num_attention_heads": 4, "hidden_size": 64, "hidden_act": "silu"}
GEMMA = {
    "model_type": "gemma3_text", "head_dim": 16, "num_hidden_layers": 6, "query_pre_attn_scalar": 16,
    "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (CONFIG | {"model_type": "gpt_neox"}, "gpt_neox"),
        (CONFIG | {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        (CONFIG | {"hidden_act": "relu"}, "activation is relu"),
        (CONFIG | {"attention_bias": True}, "biases"),
        (CONFIG | {"model_type": "mistral", "sliding_window": 4096}, "sliding window"),
        (GEMMA | {"layer_types": ["full_attention"] * 6}, "alternate"),
        (GEMMA | {"query_pre_attn_scalar": 168}, "168"),
        (GEMMA | {"rope_local_base_freq": 5000.0}, "5000 and not 10,000"),
        (GEMMA | {"final_logit_softcapping": 30.0}, "capped"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(config: dict, reason: str):
    with pytest.raises(Unsupported, match=reason):
        check_config(config)
    check_config(CONFIG)
    check_config(GEMMA)


def test_llama_3s_rotary_factors_are_those_of_transformers():
    import torch
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        "rope_theta": 500_000.0,
    }  # fmt: skip
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, head_dim=64, max_position_embeddings=512, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1.0 / 500_000.0 ** (torch.arange(0, 64, 2) / 64)
    factors = rope_factors(config.to_dict())
    assert np.allclose(plain.numpy() / scaled.numpy(), factors, rtol=1e-4) and factors.max() == 8 and factors.min() == 1


def test_a_tokenizer_whose_rule_is_not_known_is_refused(tmp_path: Path):
    folder = build(tmp_path / "m", "llama")
    told = json.loads((folder / "tokenizer.json").read_text())
    told["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "Punctuation", "behavior": "Isolated"}, told["pre_tokenizer"]]}
    (folder / "tokenizer.json").write_text(json.dumps(told))
    with pytest.raises(Unsupported, match=r"splits a text by Punctuation and ByteLevel"):
        exporters.get("gguf").write(folder, tmp_path, ExportOptions(name="t", types=("F16",)), lambda *_: None)


def test_missing_and_unknown_tensors_are_refused(tmp_path: Path):
    from safetensors.numpy import load_file, save_file

    folder = build(tmp_path / "m", "llama")
    weights = load_file(folder / "model.safetensors")
    for changed, error, words in (
        ({name: w for name, w in weights.items() if "layers.3.mlp.up" not in name}, BadData, "blk.3.ffn_up"),
        ({**weights, "model.layers.0.mlp.gate_proj.scale": weights["model.norm.weight"]}, Unsupported, "no place"),
    ):
        other = tmp_path / error.__name__
        shutil.copytree(folder, other)
        save_file(changed, other / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(error, match=words):
            exporters.get("gguf").write(other, tmp_path, ExportOptions(name="t", types=("F16",)), lambda *_: None)
