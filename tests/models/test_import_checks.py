"""What may come in as a model, and what must not."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import struct
from pathlib import Path

import pytest

from app.errors import BadData, StudioError, Unsupported
from app.models import gguf_header, import_checks, model_json
from app.shapes import FORMULAS

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_folder_of_save_pretrained_passes(folder: Path) -> None:
    shape, kept = import_checks.check_folder(folder)
    assert (shape.model_type, shape.layers, shape.vocabulary) == ("llama", 2, 512)
    assert kept.keys() == {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert "model.safetensors" in {path.name for path in import_checks.check_head(folder)[1]}


@pytest.mark.parametrize(
    "key",
    ["auto_map", "_attn_implementation", "_attn_implementation_internal", "_attn_implementation_autoset", "attn_implementation",
     "trust_remote_code", "custom_generate", "quantization_config", "_experts_implementation", "__class__", "vocab_file", "kernel_path"],
)  # fmt: skip
def test_a_config_with_a_key_that_names_code_or_a_file_is_refused(key: str) -> None:
    with pytest.raises(Unsupported, match=key.strip("_").split("_")[0] if key != "quantization_config" else "quantized"):
        import_checks.check_config({**LLAMA, key: {"AutoModel": "evil.Model"}})


def test_any_other_key_of_a_config_is_judged_by_what_the_model_computes() -> None:
    assert import_checks.check_config({**LLAMA, "surprise": {"factors": [1, 2.5], "kind": "short"}}) is not None
    assert import_checks.check_config({"model_type": "gpt2", "n_embd": 64}) is None
    assert import_checks.check_config({"model_type": "opt", "_remove_final_layer_norm": False}) is None
    with pytest.raises(BadData, match="_remove_final_layer_norm"):
        import_checks.check_config({"model_type": "opt", "_remove_final_layer_norm": "kernels/norm"})
    with pytest.raises(BadData, match="surprise"):
        import_checks.check_config({**LLAMA, "surprise": ["../secrets/postgres"]})


def test_code_is_refused_at_any_depth_of_any_json(folder: Path) -> None:
    rewrite(folder / "tokenizer_config.json", extra={"deep": [{"auto_map": {"AutoTokenizer": ["evil.Tok", None]}}]})
    with pytest.raises(Unsupported, match="auto_map"):
        import_checks.check_folder(folder)


@pytest.mark.parametrize("config", [[], None, "x", {}, {"model_type": ["llama"]}, {"model_type": "llama"}])
def test_a_config_that_is_no_models_is_refused(config: object) -> None:
    with pytest.raises((Unsupported, BadData)):
        import_checks.check_config(config)


@pytest.mark.parametrize(("key", "value"), [("hidden_size", -1), ("num_hidden_layers", 10**9), ("vocab_size", 0), ("num_attention_heads", "x"), ("num_attention_heads", 0)])  # fmt: skip
def test_widths_that_cannot_be_are_refused(key: str, value: object) -> None:
    with pytest.raises(BadData):
        import_checks.check_config({**LLAMA, key: value})


def test_json_as_deep_as_a_stack_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 200_000 + "]" * 200_000)
    with pytest.raises(BadData, match="not JSON"):
        model_json.read(tmp_path, "config.json")


class Canary:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.write_text, (self.path, "sung"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "a.pt", "rng_state.pth", "w.pkl", "x.ckpt", "y.mdl", "sub/optimizer.PT", "z.joblib"])
def test_pickled_weights_are_refused_and_never_opened(folder: Path, tmp_path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    target = folder / name
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(Unsupported, match="can run code") as caught:
        import_checks.check_folder(folder)
    assert "safetensors" in caught.value.hint and caught.value.status == 415
    assert not canary.exists()
    pickle.loads(target.read_bytes())  # the canary does sing when it is opened, so the test can fail
    assert canary.exists()


def test_a_pickle_called_safetensors_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    with pytest.raises(BadData, match="damaged"):
        import_checks.check_folder(folder)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, 0.999])
def test_truncated_weights_are_refused(folder: Path, keep: float) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep if keep >= 1 else keep * len(data))])
    with pytest.raises(BadData, match="damaged or cut short") as caught:
        import_checks.check_folder(folder)
    assert caught.value.code == "damaged_weights"


def weights(header: dict, body: bytes) -> bytes:
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + body


@pytest.mark.parametrize(
    "data",
    [
        weights({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, bytes(15)),
        weights({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, bytes(17)),
        weights({"a": {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}}, bytes(16)),
        weights({"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, -16]}}, b""),
        weights({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, bytes(12)),
        weights({"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 8]}}, bytes(8)),
        weights({"a": 3}, b""),
        weights({}, b""),
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 12) + b"[" * 12,
    ],
)  # fmt: skip
def test_a_header_that_lies_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(BadData):
        import_checks.check_safetensors(path)


def test_config_and_weights_of_two_models_are_refused(folder: Path) -> None:
    rewrite(folder / "config.json", vocab_size=1024)
    with pytest.raises(BadData, match="no such embedding"):
        import_checks.check_folder(folder)


def test_links_that_climb_out_are_refused_and_inner_ones_pass(folder: Path, tmp_path: Path) -> None:
    (folder / "blob").mkdir()
    (folder / "config.json").rename(folder / "blob" / "c")
    (folder / "config.json").symlink_to("blob/c")
    import_checks.check_folder(folder)
    (tmp_path / "secret.json").write_text("{}")
    (folder / "vocab.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(Unsupported, match="leads out"):
        import_checks.check_folder(folder)


@pytest.mark.parametrize(
    "name", ["../config.json", "a/../../config.json", "modeling_evil.py", "evil.so", "/etc/passwd", "x/config.json", "config.json\0"]
)
def test_other_names_stay_behind(name: str) -> None:
    assert not import_checks.wanted(name)


# GGUF ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small file written by the reference writer."""
    import gguf
    import numpy as np

    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(512)
    writer.add_token_list([b"a", b"b", b"c"])
    writer.add_array("general.languages", ["en"])
    for name in ("token_embd.weight", "output_norm.weight", "blk.0.attn_q.weight"):
        writer.add_tensor(name, np.random.default_rng(0).normal(size=(4, 32)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_whole_gguf_passes(gguf_file: Path) -> None:
    keys = gguf_header.check_gguf(gguf_file)
    assert keys["general.architecture"] == "llama" and keys["tokenizer.ggml.tokens"] == 3


def test_a_gguf_cut_anywhere_is_refused(gguf_file: Path, tmp_path: Path) -> None:
    data = gguf_file.read_bytes()
    path = tmp_path / "cut.gguf"
    for end in range(0, len(data) - 32, 7):
        path.write_bytes(data[:end])
        with pytest.raises(BadData, match="GGUF"):
            gguf_header.check_gguf(path)


def test_a_tensor_beyond_the_end_is_refused(gguf_file: Path, tmp_path: Path) -> None:
    data = bytearray(gguf_file.read_bytes())
    name = b"blk.0.attn_q.weight"
    place = data.index(name) + len(name) + 4 + 2 * 8 + 4  # dims, sizes, type; then the offset
    assert struct.unpack_from("<Q", data, place)[0] == 1024
    for offset in (2**62, len(data), 1024 + 32, 512, 1025):
        struct.pack_into("<Q", data, place, offset)
        (tmp_path / "far.gguf").write_bytes(data)
        with pytest.raises(BadData, match="outside the file"):
            gguf_header.check_gguf(tmp_path / "far.gguf")


def test_three_hundred_mutations_never_crash_the_reader(gguf_file: Path, tmp_path: Path) -> None:
    draw, data, path, refused = random.Random(1), gguf_file.read_bytes(), tmp_path / "m.gguf", 0
    header = data.index(b"blk.0.attn_q.weight") + 40
    for _ in range(300):
        changed = bytearray(data)
        for _ in range(draw.randint(1, 4)):
            changed[draw.randrange(header)] = draw.randrange(256)
        path.write_bytes(changed)
        try:
            gguf_header.check_gguf(path)
        except StudioError:
            refused += 1
    assert refused > 100


# The arithmetic ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMULAS)
@pytest.mark.parametrize("tied", [True, False])
def test_every_allowed_architecture_is_counted_exactly(kind: str, tied: bool) -> None:
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from app.shapes import shape_of

    extra = {"num_key_value_heads": 2, "head_dim": 32} if kind not in ("bert", "roberta", "xlm-roberta", "qwen2") else {}
    config = AutoConfig.for_model(
        kind, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, vocab_size=300, tie_word_embeddings=tied,
        max_position_embeddings=128, **extra,
    )  # fmt: skip
    shape = shape_of(json.loads(config.to_json_string(use_diff=False)))
    with torch.device("meta"):
        model = (AutoModel if shape.architecture == "encoder" else AutoModelForCausalLM).from_config(config)
    if shape.architecture == "decoder":
        model.tie_weights()
    assert shape.parameters() == sum(p.numel() for p in model.parameters())
