"""Writes the weights of an 8-bit checkpoint out in bf16 (`app/models/quantized.py` says which are read).

A weight of 8 bits times its scale is computed in float32 and rounded once. Tensors without a scale are copied as they are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from app.errors import BadData
from app.models import import_checks
from app.models.quantized import Scheme

PART_BYTES = 2 * 2**30
"""Size of the files that are written; so much is in memory."""
STORED = ("F8_E4M3", "F8_E5M2", "I8")


def write_weights(files: Sequence[Path], into: Path, scheme: Scheme) -> None:
    """Write the tensors of some safetensors files into `into`, dequantized, with an index where they are several files.

    Raises BadData for a weight without its scale, a scale of another size, and results that are not finite.
    """
    source = _Source(files)
    places: dict[str, str] = {}
    for number, part in enumerate(_parts(source, scheme), start=1):
        name = f"model-{number:05}.safetensors"
        save_file(part, into / name, metadata={"format": "pt"})
        places |= dict.fromkeys(part, name)
    if len(set(places.values())) == 1:
        (into / "model-00001.safetensors").rename(into / "model.safetensors")
    else:
        (into / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


class _Source:
    """The tensors of several files by name, opened one at a time."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.headers: dict[str, tuple[str, list[int]]] = {}
        self.files: dict[str, Path] = {}
        for path in files:
            found = import_checks.check_safetensors(path)
            self.headers |= found
            self.files |= dict.fromkeys(found, path)

    def read(self, name: str) -> torch.Tensor:
        with safe_open(self.files[name], framework="pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(name)
        return tensor


def _parts(source: _Source, scheme: Scheme) -> Iterator[dict[str, torch.Tensor]]:
    """All tensors in groups of about PART_BYTES."""
    part: dict[str, torch.Tensor] = {}
    for name in _kept(source.headers, scheme):
        part[name] = _read(source, scheme, name)
        if sum(tensor.nbytes for tensor in part.values()) >= PART_BYTES:
            yield part
            part = {}
    if part:
        yield part


def _kept(headers: Mapping[str, tuple[str, list[int]]], scheme: Scheme) -> list[str]:
    """Names of the tensors that the model has: all but scales and what belongs to quantized activations."""
    stored = [name for name, (dtype, _) in headers.items() if dtype in STORED]
    weights = [name for name in stored if not (scheme.zero_point and name.endswith(scheme.zero_point))]
    beside = {scheme.scale_of(name) for name in weights} | {name + scheme.zero_point for name in weights if scheme.zero_point}
    ends = (*scheme.dropped, *([scheme.formats] if scheme.formats else []))
    kept = [name for name in headers if name not in beside and not (ends and name.endswith(ends))]
    for name in weights:
        if scheme.scale_of(name) not in headers:
            raise BadData(f"The weight {name[:80]} has 8 bits and no scale.", hint="Copy the whole model.", param="path")
    lone = [name for name in kept if name.endswith(scheme.scale)]
    if lone:
        raise BadData(f"The scale {lone[0][:80]} belongs to no weight of 8 bits.", hint="Copy the whole model.", param="path")
    return kept


def _read(source: _Source, scheme: Scheme, name: str) -> torch.Tensor:
    """A tensor as the model has it."""
    tensor = source.read(name)
    if source.headers[name][0] not in STORED:
        return tensor
    if scheme.formats and (beside := name.removesuffix("weight") + scheme.formats) in source.headers and int(source.read(beside).max()):
        raise BadData(f"The weight {name[:80]} is laid out for another GPU.", hint="Save the model again with a current bitsandbytes.")
    value = tensor.float()
    if scheme.zero_point and name + scheme.zero_point in source.headers:
        value = value - _spread(source.read(name + scheme.zero_point).float(), value.shape, scheme, name)
    scale = _spread(source.read(scheme.scale_of(name)).float(), value.shape, scheme, name)
    found = (value * scale / scheme.divisor).to(torch.bfloat16)
    if not torch.isfinite(found).all():
        raise BadData(f"The weight {name[:80]} is not a number somewhere.", hint="Copy or download it again.", code="damaged_weights")
    return found


def _spread(scale: torch.Tensor, sizes: Sequence[int], scheme: Scheme, name: str) -> torch.Tensor:
    """A scale as it is multiplied with a weight of these sizes, (…, rows, columns): one number, one of each row, or one of each block."""
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.dim() == 1 and scale.numel() == sizes[0]:
        scale = scale[:, None]
    rows, columns = sizes[-2:]
    block = scheme.block or (rows // max(scale.shape[-2], 1), columns // max(scale.shape[-1], 1)) if scale.dim() == len(sizes) else (0, 0)
    grid = [*sizes[:-2], *(math.ceil(size / n) if n else 0 for size, n in zip((rows, columns), block, strict=True))]
    if list(scale.shape) != grid or (scheme.block is None and (rows % grid[-2] or columns % grid[-1])):
        raise BadData(
            f"The scale of {name[:80]} has the sizes {list(scale.shape)}, which do not fit its weight {list(sizes)}.", param="path"
        )
    return scale.repeat_interleave(block[0], -2)[..., :rows, :].repeat_interleave(block[1], -1)[..., :columns]
