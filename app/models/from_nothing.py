"""Small decoders with random weights, which know nothing: what pre-training begins with.

They are written here, without torch: a Llama's config.json, a tokenizer whose tokens are the 256 bytes, and weights from a normal
distribution of standard deviation 0.02, as transformers initializes them. The same shape and seed give the same files.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import struct
import uuid
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy.orm import Session

from app import limits
from app.db import on_rollback
from app.kit import manifest
from app.models import import_checks
from app.ownership import mine
from app.settings import get_settings
from app.shapes import shape_of
from app.storage import places
from app.tables import Model, User

END = "<|endoftext|>"
SEED = 7
STANDARD_DEVIATION = 0.02
POSITIONS = 512


class BlankSize(NamedTuple):
    """The shape of a model from nothing."""

    hidden: int
    layers: int

    @property
    def intermediate(self) -> int:
        return 3 * self.hidden

    @property
    def heads(self) -> int:
        return max(2, self.hidden // 32)


def config_of(size: BlankSize) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": size.hidden, "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers, "num_attention_heads": size.heads, "num_key_value_heads": size.heads, "vocab_size": 257,
        "head_dim": size.hidden // size.heads, "max_position_embeddings": POSITIONS, "tie_word_embeddings": True, "hidden_act": "silu",
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "initializer_range": STANDARD_DEVIATION, "dtype": "float32", "bos_token_id": None,
        "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip


def ensure(session: Session, user: User, size: BlankSize) -> Model:
    """The model of this size in the person's project, written unless it is there. Raises LimitReached."""
    shape = shape_of(config_of(size))
    name = f"from-nothing-{size.hidden}x{size.layers}"
    found = session.scalar(mine(Model, user).where(Model.name == name, Model.status == "ready").limit(1))
    if found is not None:
        return found
    limits.check(session, user, "storage_bytes")
    key = uuid.uuid4()
    folder = get_settings().folder("models") / str(key)
    folder.mkdir()
    on_rollback(session, lambda: shutil.rmtree(folder, ignore_errors=True))
    write(folder, size)
    source = {"from": "nothing", "seed": SEED}
    facts = manifest.write(folder, source=source, license=None, kind="generic", shape=shape.model_dump(), rules=import_checks.RULES)
    places.push(f"models/{key}")
    model = Model(
        id=key, owner_id=user.id, project_id=user.project_id, name=name, title=f"From nothing, {shape.parameters() / 1e6:.2g} M", kind="generic",
        path=f"models/{key}", revision=facts["revision"], bytes=facts["bytes"], source=source, shape=shape.model_dump(),
    )  # fmt: skip
    session.add(model)
    session.flush()
    return model


def is_blank(model: Model) -> bool:
    """Whether it has random weights, so that nothing is to be had from prompting it."""
    return model.source.get("from") == "nothing"


def write(folder: Path, size: BlankSize) -> None:
    """The files of the model."""
    texts = {
        "config.json": config_of(size),
        "generation_config.json": {"eos_token_id": 0, "pad_token_id": 0},
        "tokenizer.json": _tokenizer(),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END, "model_max_length": POSITIONS,
        },
    }  # fmt: skip
    for name, value in texts.items():
        (folder / name).write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")
    _write_weights(folder / "model.safetensors", size)


def _tensors(size: BlankSize) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, as transformers names a Llama's; its head is the embedding."""
    h, m = size.hidden, size.intermediate
    yield "model.embed_tokens.weight", (257, h)
    for layer in range(size.layers):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", (h,)
        yield from ((f"{at}.self_attn.{name}_proj.weight", (h, h)) for name in "qkvo")
        yield f"{at}.post_attention_layernorm.weight", (h,)
        yield from ((f"{at}.mlp.{name}_proj.weight", (m, h)) for name in ("gate", "up"))
        yield f"{at}.mlp.down_proj.weight", (h, m)
    yield "model.norm.weight", (h,)


def _write_weights(path: Path, size: BlankSize) -> None:
    """A safetensors file: the length of its header, the header as JSON, and float32 values. Norms are ones."""
    draw, header, place = random.Random(SEED), {}, 0
    for name, shape in _tensors(size):
        end = place + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": (place, end)}
        place = end
    head = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for _, shape in _tensors(size):
            count = math.prod(shape)
            values = [1.0] * count if len(shape) == 1 else [draw.gauss(0.0, STANDARD_DEVIATION) for _ in range(count)]
            file.write(array("f", values).tobytes())


def _tokenizer() -> dict[str, Any]:
    """A byte-level tokenizer without merges: every byte is a token, so the model has to learn spelling from single letters."""
    kind = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    added = {"id": 0, "content": END, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    vocabulary = {END: 0} | {letter: place for place, letter in enumerate(_letters(), start=1)}
    model: dict[str, Any] = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
        "byte_fallback": False, "ignore_merges": False, "vocab": vocabulary, "merges": [],
    }  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [added], "normalizer": None, "pre_tokenizer": kind,
        "post_processor": None, "decoder": kind, "model": model,
    }  # fmt: skip


def _letters() -> list[str]:
    """The character by which byte-level tokenizers write each byte: itself where it is visible, else one from 256 on (Radford et al.
    2019, GPT-2)."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = iter(range(256, 512))
    return [chr(byte if byte in visible else next(hidden)) for byte in range(256)]
