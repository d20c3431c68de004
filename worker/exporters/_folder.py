"""Folders of models as transformers loads them: what is copied, and weights in another dtype."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from app.errors import BadData, Unsupported
from app.kit import manifest
from app.shapes import STRUCTURE
from worker.exporters._base import completed

if TYPE_CHECKING:
    import torch

LEFT_OUT = ("README.md", manifest.NAME, manifest.SEEN)
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
SHARD_BYTES = 4 * 10**9
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def copy_others(source: Path, into: Path, leave: Callable[[str], object] = lambda name: None) -> None:
    """Copy the files of a model's folder, without the studio's own and those that `leave` names."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name not in LEFT_OUT and not leave(path.name):
            shutil.copyfile(path, into / path.name)


def write_weights(source: Path, into: Path, kind: str, share: Callable[[float], None] = lambda _: None) -> None:
    """The weights of `source` in one of DTYPES, in shards of at most SHARD_BYTES, and the dtype in the config.

    One shard at a time is in memory. Raises Unsupported for a weight that exceeds the dtype's range, BadData where there are none.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    dtype = getattr(torch, DTYPES[kind])
    shards = _shards(source, dtype.itemsize)
    total = sum(tensor.bytes for group in shards for tensor in group)
    places: dict[str, str] = {}
    done = 0
    for number, group in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        if not (into / file).is_file():
            tensors = {}
            for tensor in group:
                with safe_open(tensor.file, framework="pt") as opened:
                    tensors[tensor.name] = _cast(tensor.name, opened.get_tensor(tensor.name), dtype)
            with completed(into / file) as part:
                save_file(tensors, part, metadata={"format": "pt"})
        places |= dict.fromkeys((tensor.name for tensor in group), file)
        done += sum(tensor.bytes for tensor in group)
        share(done / total)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (into / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    config: dict[str, Any] = json.loads((source / "config.json").read_text())
    config.pop(STRUCTURE, None)  # ours alone
    config.pop("torch_dtype", None)
    (into / "config.json").write_text(json.dumps({**config, "dtype": DTYPES[kind]}, indent=2, sort_keys=True) + "\n")


class StoredTensor(NamedTuple):
    """A tensor, the file it is in, and its bytes in the dtype that is written."""

    name: str
    file: Path
    bytes: int


def _shards(source: Path, itemsize: int) -> list[list[StoredTensor]]:
    """The tensors in groups of at most SHARD_BYTES at `itemsize` bytes per weight."""
    from safetensors import safe_open

    shards: list[list[StoredTensor]] = []
    room = 0
    for path in sorted(p for p in source.glob("model*.safetensors") if WEIGHTS.fullmatch(p.name)):
        with safe_open(path, framework="pt") as opened:
            for name in sorted(opened.keys()):
                size = itemsize * math.prod(opened.get_slice(name).get_shape())
                if not shards or size > room:
                    shards.append([])
                    room = SHARD_BYTES
                shards[-1].append(StoredTensor(name, path, size))
                room -= size
    if not shards:
        raise BadData("The folder holds no weights.", hint="Add the model again.")
    return shards


def _cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    import torch

    if not tensor.is_floating_point():
        return tensor.contiguous()
    cast = tensor.to(dtype).contiguous()
    if not torch.isfinite(cast).all():
        raise Unsupported(f"The weight {name[:80]} exceeds the range of {dtype}.", hint="Choose BF16 or F32.", param="types")
    return cast
