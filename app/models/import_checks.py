"""What may be imported as a model: which files, what their JSON contains, and whether the weights match their header.

Nothing here runs or unpickles anything of the model's. Pickled weights can run code when they are opened (torch's `weights_only`
was bypassed too), a config.json can name code to import or an attention kernel to fetch, and a tokenizer's files can name a file
of this machine to read; so only safetensors and only known keys pass (`app/models/model_json.py`). The lists name what is
allowed, never what is forbidden.

`check_head` is quick and runs within a request. `check_folder` reads everything; it runs in a child with limits.
"""

from __future__ import annotations

import fnmatch
import itertools
import json
import re
import struct
from pathlib import Path
from typing import Any

from app.errors import BadData, Unsupported
from app.kit.humanize import human_number
from app.languages import gettext
from app.models import model_json, quantized
from app.shapes import FORMULAS, Shape, shape_of

ALLOWED_FILES = (
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
    "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json",
    "LICENSE*", "NOTICE*", "README.md",
)  # fmt: skip
"""Files that are copied from a folder or fetched from the hub; all others are ignored."""

PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".mdl", ".joblib", ".npy", ".npz", ".h5", ".msgpack", ".dill")
"""Extensions of files that run code when they are opened, or that are weights in an unsupported format."""

TOKENIZERS = {
    "BertTokenizer": ("vocab.txt",),
    "GPT2Tokenizer": ("vocab.json", "merges.txt"),
    "Qwen2Tokenizer": ("vocab.json", "merges.txt"),
    "RobertaTokenizer": ("vocab.json", "merges.txt"),
    "LlamaTokenizer": ("tokenizer.model",),
    "CodeLlamaTokenizer": ("tokenizer.model",),
    "GemmaTokenizer": ("tokenizer.model",),
    "XLMRobertaTokenizer": ("tokenizer.model",),
    "TokenizersBackend": ("tokenizer.json",),
    "PreTrainedTokenizer": ("tokenizer.json",),
}
"""Tokenizer classes that are used, without the suffix `Fast`, and the files each reads where there is no tokenizer.json."""
PLAIN_TOKENIZER = "PreTrainedTokenizerFast"
"""The class with which the tokenizer.json of any other class is read: it has no code of its own."""

_OWN_TOKENIZER = {
    "llama": "LlamaTokenizer", "mistral": "LlamaTokenizer", "qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer",
    "gemma3_text": "GemmaTokenizer", "bert": "BertTokenizer", "roberta": "RobertaTokenizer", "xlm-roberta": "XLMRobertaTokenizer",
}  # fmt: skip

RULES = 3
"""Version of these rules. A model that was imported under an earlier one is examined again (`app/models/imports.py`)."""

_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
_MAX_HEADER_BYTES = 8 * 2**20  # a hundred layers take some 100 kB
_MAX_TEXT_BYTES = 32 * 2**20  # of vocab.txt, merges.txt, tokenizer.model, a template, a model card
_MAX_ENTRIES = 10_000


# Config -------------------------------------------------------------------------------------------------------------


def check_config(config: Any) -> Shape | None:
    """The shape that a config.json gives, None for an architecture whose shape is read from the model itself. Raises Unsupported for
    a key that names code, BadData for a value."""
    if not isinstance(config, dict):
        raise BadData(gettext("config.json does not hold an object."), hint=gettext("Use a folder saved by save_pretrained()."))
    model_json.refuse_code(config, "config.json")
    kind = config.get("model_type")
    if not isinstance(kind, str) or not re.fullmatch(r"[a-z0-9][\w-]{0,59}", kind):
        raise BadData(gettext("config.json names no model_type."), hint=gettext("Use a folder saved by save_pretrained()."), param="path")
    if "quantization_config" in config:
        quantized.scheme_of(config["quantization_config"])
        config = {key: value for key, value in config.items() if key != "quantization_config"}
    config = model_json.check("config.json", config)
    if kind not in FORMULAS:
        return None
    try:
        shape = shape_of(config)
    except BadData:
        raise
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise BadData(
            gettext("config.json has a value of the wrong kind: %(error)s", error=str(error)[:200]), hint=gettext("Save the model again.")
        ) from None
    check_widths(shape)
    return shape


def check_widths(shape: Shape) -> None:
    limits = {"layers": 512, "hidden": 65_536, "intermediate": 524_288, "heads": 1024, "kv_heads": 1024, "head_dim": 4096}
    limits |= {"vocabulary": 4_194_304, "positions": 16_777_216}
    for name, most in limits.items():
        value = getattr(shape, name)
        if not 1 <= value <= most:
            raise BadData(
                gettext("config.json says %(name)s = %(value)s; possible are 1 to %(most)s.", name=name, value=value, most=most),
                hint=gettext("Save the model again."),
            )


# Weights ------------------------------------------------------------------------------------------------------------


def check_safetensors(path: Path) -> dict[str, tuple[str, list[int]]]:
    """`{tensor: (dtype, sizes)}` of a file whose header matches its length to the byte. Raises BadData.

    Layout: 8 bytes little-endian length n, n bytes JSON, then the tensors without gaps.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise _torn(path, "its header does not fit into the file")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        found = {name: (str(x["dtype"]), [int(n) for n in x["shape"]], [int(n) for n in x["data_offsets"]]) for name, x in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise _torn(path, "its header is not what safetensors writes") from None
    end = 0
    for name, (dtype, sizes, offsets) in sorted(found.items(), key=lambda item: item[1][2]):
        if dtype not in _SIZES:
            raise Unsupported(
                f"{path.name}: the tensor {name[:80]!r} has the number format {dtype[:20]}.", hint="Use 16 or 32 bit weights."
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
    return BadData(f"{path.name} is damaged or cut short: {why}.", hint="Copy or download it again.", param="path", code="damaged_weights")


# Folders ------------------------------------------------------------------------------------------------------------


def wanted(name: str) -> bool:
    """Whether a file of this name, relative to the model's folder, is imported."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in ALLOWED_FILES) and ".." not in name


def refuse_pickled(name: str) -> None:
    """Raises Unsupported for the name of a pickled file."""
    if name.lower().endswith(PICKLED):
        raise Unsupported(
            gettext(
                "%(name)s is in a format that can run code when it is opened (or that is not read here), so nothing of this folder was taken.",
                name=name[:120],
            ),
            hint=gettext(
                "Luthier takes safetensors only. Load the model where you trust it, call save_pretrained(), "
                "and add the new folder; or remove such files when model.safetensors is next to them."
            ),
            param="path",
            code="pickled_weights",
        )


def list_folder(folder: Path) -> list[Path]:
    """The files of a folder that would be imported. Raises Unsupported for pickled files and links that lead outside, BadData for
    a folder of ten thousand entries."""
    root = folder.resolve()
    entries = list(itertools.islice(folder.rglob("*"), _MAX_ENTRIES + 1))
    if len(entries) > _MAX_ENTRIES:
        raise BadData(
            gettext("%(folder)s holds more than %(most)s files.", folder=folder.name, most=human_number(_MAX_ENTRIES)),
            hint=gettext("Give the folder of one model."),
            param="path",
        )
    found = []
    for path in sorted(p for p in entries if p.is_symlink() or p.is_file()):
        name = path.relative_to(folder).as_posix()
        refuse_pickled(name)
        if not wanted(name):
            continue
        try:
            outside = root not in path.resolve().parents
        except (OSError, RuntimeError):  # a link to itself
            outside = True
        if outside:
            raise Unsupported(
                gettext("%(name)s is a link that leads out of the folder.", name=name),
                hint=gettext("Copy the files themselves (cp -rL) and add that folder."),
                param="path",
            )
        if path.is_file():
            found.append(path)
    return found


def check_head(folder: Path) -> tuple[Shape | None, list[Path]]:
    """What `check_config` gives, and the files that would be imported; no other file is opened. Raises Unsupported or BadData."""
    if not folder.is_dir():
        raise BadData(
            gettext("There is no folder %(folder)s.", folder=folder), hint=gettext("Give the folder that holds config.json."), param="path"
        )
    files = list_folder(folder)
    names = {path.relative_to(folder).as_posix() for path in files}
    if "config.json" not in names:
        raise BadData(
            gettext("%(folder)s holds no config.json.", folder=folder.name),
            hint=gettext("Give the folder that save_pretrained() wrote."),
            param="path",
        )
    if not names & {"tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json"}:
        raise BadData(
            gettext("%(folder)s holds no tokenizer.", folder=folder.name),
            hint=gettext("Save the tokenizer into the same folder."),
            param="path",
        )
    if not any(name.endswith(".safetensors") for name in names):
        raise Unsupported(
            gettext("%(folder)s holds no model.safetensors.", folder=folder.name),
            hint=gettext("Save the model with save_pretrained()."),
            param="path",
        )
    return check_config(model_json.read(folder, "config.json")), files


def check_folder(folder: Path) -> tuple[Shape | None, dict[str, Any]]:
    """What `check_config` gives for a transformers folder that may be imported, and its JSON files as they are kept: `{name: value}`.

    Raises Unsupported or BadData. It may take as much memory as the largest of those files.
    """
    shape, files = check_head(folder)
    kept: dict[str, Any] = {}
    for path in files:
        name = path.relative_to(folder).as_posix()
        if name in model_json.MAX_BYTES:
            kept[name] = model_json.check(name, model_json.read(folder, name))
        elif path.suffix != ".safetensors" and path.stat().st_size > _MAX_TEXT_BYTES:
            raise BadData(
                f"{name} is larger than {_MAX_TEXT_BYTES // 2**20} MiB.", hint="Remove it if it belongs to no model.", param="path"
            )
    kept["tokenizer_config.json"] = check_tokenizer(folder, kept["config.json"]["model_type"], kept.get("tokenizer_config.json", {}))
    weights = [path for path in files if path.suffix == ".safetensors"]
    check_weights(weights, kept.get("model.safetensors.index.json"), shape)
    return shape, kept


def check_tokenizer(folder: Path, model_type: str, config: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer's settings as they are kept. Its class is a known one whose files exist, since a library makes up what is missing,
    or reads another's; any other one is read from tokenizer.json alone."""
    named = config.get("tokenizer_class") or _OWN_TOKENIZER.get(model_type)
    needed = TOKENIZERS.get(str(named).removesuffix("Fast"))
    if needed is None:
        if not (folder / "tokenizer.json").is_file():
            raise Unsupported(
                f"The tokenizer is of the class {str(named)[:60]!r}, which is read here from tokenizer.json only, and there is none.",
                hint="Load it where you trust it with AutoTokenizer, call save_pretrained(), and add the new folder.",
                param="path",
            )
        return {**config, "tokenizer_class": PLAIN_TOKENIZER}
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing and not (folder / "tokenizer.json").is_file():
        raise BadData(
            f"The folder holds neither tokenizer.json nor {missing[0]}, which a {named} is read from.",
            hint="Save the tokenizer into the same folder.",
            param="path",
        )
    return config


def check_weights(weights: list[Path], index: dict[str, Any] | None, shape: Shape | None) -> None:
    """Check that every weights file is complete, the index names only existing files, and the embedding has the size of `shape`."""
    tensors: dict[str, tuple[str, list[int]]] = {}
    for path in weights:
        tensors |= check_safetensors(path)
    named: dict[str, str] = (index or {}).get("weight_map") or {}
    missing = set(named.values()) - {path.name for path in weights}
    if missing:
        raise BadData(f"The weights file {sorted(missing)[0][:80]} is missing.", hint="Copy the whole folder.", param="path")
    tables = [sizes for name, (_, sizes) in tensors.items() if name.endswith(("embed_tokens.weight", "word_embeddings.weight"))]
    if shape and [shape.vocabulary, shape.hidden] not in tables:
        raise BadData(
            f"config.json speaks of {shape.vocabulary} tokens of width {shape.hidden}, and the weights hold no such embedding.",
            hint="Config and weights must come from the same model.",
            param="path",
        )
