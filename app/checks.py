"""What may come in as a model: which files, which keys of config.json, and whether the weights are what their header says.

Nothing here runs or unpickles anything of the model's. Pickled weights can run code when they are opened (torch's
`weights_only` was bypassed too), and a config.json can name code to import or an attention kernel to fetch; so only
safetensors and only known keys pass. The lists name what is allowed, never what is forbidden.
"""

from __future__ import annotations

import fnmatch
import json
import struct
from pathlib import Path
from typing import Any

from app.errors import BadData, Unsupported
from app.shapes import Shape, shape_of

ALLOWED_FILES = (
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
    "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json",
    "LICENSE*", "NOTICE*", "README.md",
)  # fmt: skip
"""Files that are copied from a folder or asked of the hub; everything else stays behind."""

PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".mdl", ".joblib", ".npy", ".npz", ".h5", ".msgpack", ".dill")
"""Endings of files that run code when they are opened, or that are weights in a form not read here."""

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "bert", "roberta", "xlm-roberta")
"""Architectures whose arithmetic in `app/shapes.py` is tested against the model itself."""

_KEY_WORDS = (
    "architectures model_type torch_dtype dtype transformers_version _name_or_path name_or_path "
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "max_position_embeddings type_vocab_size hidden_act hidden_activation rms_norm_eps layer_norm_eps "
    "initializer_range initializer_factor attention_bias mlp_bias use_bias attention_dropout attention_probs_dropout_prob "
    "hidden_dropout_prob classifier_dropout hidden_dropout position_embedding_type gradient_checkpointing "
    "rope_theta rope_scaling rope_parameters rope_local_base_freq rope_interleaved is_llama_config "
    "sliding_window use_sliding_window max_window_layers layer_types sliding_window_pattern _sliding_window_pattern "
    "attn_logit_softcapping final_logit_softcapping query_pre_attn_scalar use_bidirectional_attention "
    "bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id decoder_start_token_id "
    "tie_word_embeddings use_cache pretraining_tp is_decoder add_cross_attention cross_attention_hidden_size use_mrope "
    "num_labels id2label label2id problem_type finetuning_task output_past chunk_size_feed_forward "
    "return_dict output_attentions output_hidden_states is_encoder_decoder transformers.js_config"
)
_KEYS = frozenset(_KEY_WORDS.split())
_FORBIDDEN = ("auto_map", "trust_remote_code", "custom_generate", "custom_pipelines")
_FORBIDDEN_STARTS = ("_attn_implementation", "attn_implementation", "_experts_implementation", "_commit_hash")
_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
_LONGEST_HEADER = 32 * 2**20
_LONGEST_JSON = 64 * 2**20  # a tokenizer.json of 256k tokens has 33 MB


# JSON ---------------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """One JSON file of a model. Raises BadData when it is too long, too deep or not JSON."""
    if path.stat().st_size > _LONGEST_JSON:
        raise BadData(f"{path.name} is larger than {_LONGEST_JSON // 2**20} MiB.", way_out="Such a file belongs to no model read here.")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadData(f"{path.name} is not JSON: {str(error)[:200]}", way_out="Save the model again with save_pretrained().") from None


def check_no_code(value: Any, where: str) -> None:
    """Refuse a key, at any depth, that makes a library import code or fetch a kernel. Raises Unsupported."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            for key in item:
                if key in _FORBIDDEN or str(key).startswith(_FORBIDDEN_STARTS):
                    raise Unsupported(
                        f"{where} has the key {key!r}, which makes a library load code that came with the model.",
                        way_out="Luthier never runs a model's own code. Use a model of a standard architecture, or remove the key.",
                        param="path",
                    )
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)


def check_config(config: Any) -> Shape:
    """The shape of a model whose config.json holds only known keys. Raises Unsupported or BadData."""
    if not isinstance(config, dict):
        raise BadData("config.json does not hold an object.", way_out="Use a folder saved by save_pretrained().")
    check_no_code(config, "config.json")
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise Unsupported(
            f"The architecture {str(kind)[:60]!r} is not one that Luthier tunes.",
            way_out=f"Supported are {', '.join(MODEL_TYPES)}.",
            param="path",
        )
    if "quantization_config" in config:
        raise Unsupported(
            "The weights are quantised, and quantised weights cannot be tuned as they are.",
            way_out="Use the model's unquantised version (16 or 32 bit safetensors).",
            param="path",
        )
    unknown = sorted(str(key)[:60] for key in config if key not in _KEYS)
    if unknown:
        raise Unsupported(
            f"config.json has keys that Luthier does not know: {', '.join(unknown[:8])}.",
            way_out="Remove keys that do not matter; a key that changes the arithmetic means the architecture is not supported.",
            param="path",
        )
    try:
        shape = shape_of(config)
    except BadData:
        raise
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise BadData(f"config.json has a value of the wrong kind: {str(error)[:200]}", way_out="Save the model again.") from None
    _check_widths(shape)
    return shape


def _check_widths(shape: Shape) -> None:
    limits = {"layers": 512, "hidden": 65_536, "intermediate": 524_288, "heads": 1024, "kv_heads": 1024, "head_dim": 4096}
    limits |= {"vocabulary": 4_194_304, "positions": 16_777_216}
    for name, most in limits.items():
        value = getattr(shape, name)
        if not 1 <= value <= most:
            raise BadData(f"config.json says {name} = {value}; possible are 1 to {most}.", way_out="Save the model again.")


# Weights ------------------------------------------------------------------------------------------------------------


def check_safetensors(path: Path) -> dict[str, tuple[str, list[int]]]:
    """`{tensor: (dtype, sizes)}` of a file whose header and length agree to the byte. Raises BadData.

    Layout: 8 bytes little-endian length n, n bytes JSON, then the tensors without gaps.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
            raise _torn(path, "its header does not fit into the file")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        found = {name: (str(x["dtype"]), [int(n) for n in x["shape"]], [int(n) for n in x["data_offsets"]]) for name, x in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _torn(path, "its header is not what safetensors writes") from None
    end = 0
    for name, (dtype, sizes, offsets) in sorted(found.items(), key=lambda item: item[1][2]):
        if dtype not in _SIZES:
            raise Unsupported(
                f"{path.name}: the tensor {name[:80]!r} has the number format {dtype[:20]}.", way_out="Use 16 or 32 bit weights."
            )
        count = _SIZES[dtype]
        for n in sizes:
            count *= n
        if min(sizes, default=1) < 0 or len(offsets) != 2 or offsets != [end, end + count]:
            raise _torn(path, f"the tensor {name[:80]!r} does not lie where its size says")
        end = offsets[1]
    if not found or end != size - 8 - length:
        raise _torn(path, f"the header promises {end} bytes of weights and the file holds {size - 8 - length}")
    return {name: (dtype, sizes) for name, (dtype, sizes, _) in found.items()}


def _torn(path: Path, why: str) -> BadData:
    return BadData(
        f"{path.name} is damaged or cut short: {why}.", way_out="Copy or download it again.", param="path", code="damaged_weights"
    )


# Folders ------------------------------------------------------------------------------------------------------------


def wanted(name: str) -> bool:
    """Whether a file of this name, relative to the model's folder, is brought in."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in ALLOWED_FILES) and ".." not in name


def refuse_pickled(name: str) -> None:
    """Raises Unsupported for the name of a pickled file."""
    if name.lower().endswith(PICKLED):
        raise Unsupported(
            f"{name[:120]} is in a format that can run code when it is opened (or that is not read here), so nothing of this folder was taken.",
            way_out="Luthier takes safetensors only. Load the model where you trust it, call save_pretrained(), "
            "and add the new folder; or remove such files when model.safetensors stands beside them.",
            param="path",
            code="pickled_weights",
        )


def list_folder(folder: Path) -> list[Path]:
    """The files of a folder that would be brought in. Raises Unsupported for pickled files and links that climb out."""
    root = folder.resolve()
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.is_symlink() or p.is_file()):
        name = path.relative_to(folder).as_posix()
        refuse_pickled(name)
        if not wanted(name):
            continue
        if root not in path.resolve().parents:
            raise Unsupported(
                f"{name} is a link that leads out of the folder.",
                way_out="Copy the files themselves (cp -rL) and add that folder.",
                param="path",
            )
        if path.is_file():
            found.append(path)
    return found


def check_folder(folder: Path) -> tuple[Shape, list[Path]]:
    """The shape and the files of a transformers folder that may come in. Raises Unsupported or BadData."""
    if not folder.is_dir():
        raise BadData(f"There is no folder {folder}.", way_out="Give the folder that holds config.json.", param="path")
    files = list_folder(folder)
    names = {path.relative_to(folder).as_posix() for path in files}
    if "config.json" not in names:
        raise BadData(f"{folder.name} holds no config.json.", way_out="Give the folder that save_pretrained() wrote.", param="path")
    shape = check_config(read_json(folder / "config.json"))
    for path in files:
        if path.suffix == ".json" and path.name != "config.json":
            check_no_code(read_json(path), path.name)
    if not names & {"tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json"}:
        raise BadData(f"{folder.name} holds no tokenizer.", way_out="Save the tokenizer into the same folder.", param="path")
    check_weights(folder, [path for path in files if path.suffix == ".safetensors"], shape)
    return shape, files


def check_weights(folder: Path, weights: list[Path], shape: Shape) -> None:
    """Every weights file is whole, the index names only files that are there, and the embedding has the config's size."""
    if not weights:
        raise Unsupported(f"{folder.name} holds no model.safetensors.", way_out="Save the model with save_pretrained().", param="path")
    tensors: dict[str, tuple[str, list[int]]] = {}
    for path in weights:
        tensors |= check_safetensors(path)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = read_json(index).get("weight_map", {})
        missing = set(map(str, named.values())) - {path.name for path in weights}
        if missing:
            raise BadData(f"The weights file {sorted(missing)[0][:80]} is missing.", way_out="Copy the whole folder.", param="path")
    tables = [sizes for name, (_, sizes) in tensors.items() if name.endswith(("embed_tokens.weight", "word_embeddings.weight"))]
    if [shape.vocabulary, shape.hidden] not in tables:
        raise BadData(
            f"config.json speaks of {shape.vocabulary} tokens of width {shape.hidden}, and the weights hold no such embedding.",
            way_out="Config and weights must come from the same model.",
            param="path",
        )
