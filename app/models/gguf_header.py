"""Reads and checks the header of an untrusted GGUF file.

Layout (GGUF 3, little-endian): magic, version, tensor count, key count, the keys, then for each tensor its name, sizes, type and
offset; padding; the tensors. A reader that trusts an offset beyond the file's end reads foreign memory, so every count, length
and offset is compared with the file's length before anything is read through it.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

from app.errors import BadData

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
# type: (numbers per block, bytes per block)
_BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 40), 10: (256, 84),
    11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292), 20: (32, 18), 23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4),
    27: (1, 8), 28: (1, 8), 30: (1, 2),
}  # fmt: skip
_MAX_KEYS, _MAX_TENSORS, _MAX_TEXT_LENGTH, _MAX_ITEMS = 4096, 65_536, 2**20, 2**24


class _Reader:
    """Reads forward through a file and refuses to go past its end."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size

    def take(self, count: int) -> bytes:
        if not 0 <= count <= self.size - self.file.tell():
            raise _bad("a length points past the end of the file")
        return self.file.read(count)

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        length = self.number("<Q")
        if length > _MAX_TEXT_LENGTH:
            raise _bad("a text is longer than a megabyte")
        return self.take(length).decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY or depth > 1:
            raise _bad(f"a value has the unknown type {kind}")
        inner, count = self.number("<I"), self.number("<Q")
        if count > _MAX_ITEMS or count > self.size:
            raise _bad("a list is longer than the file")
        if inner in _SCALARS:
            self.take(count * struct.calcsize(_SCALARS[inner]))
            return count
        for _ in range(count):
            self.value(inner, depth + 1)
        return count


def _bad(why: str) -> BadData:
    return BadData(f"The GGUF file is damaged: {why}.", hint="Download it again.", code="damaged_weights")


def check_gguf(path: Path) -> dict[str, Any]:
    """The keys of a file whose tensors are all inside it, with lists replaced by their length. Raises BadData."""
    size = path.stat().st_size
    with path.open("rb") as file:
        reader = _Reader(file, size)
        if reader.take(4) != b"GGUF":
            raise _bad("it does not begin with GGUF")
        version, tensors, count = reader.number("<I"), reader.number("<Q"), reader.number("<Q")
        if version not in (2, 3) or not 0 < tensors <= _MAX_TENSORS or count > _MAX_KEYS:
            raise _bad(f"version {version}, {tensors} tensors and {count} keys cannot be")
        keys: dict[str, Any] = {}
        for _ in range(count):
            name = reader.text()
            keys[name] = reader.value(reader.number("<I"))
        extents = [_tensor(reader) for _ in range(tensors)]
        align = keys.get("general.alignment", 32)
        if not isinstance(align, int) or align not in (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096):
            raise _bad(f"an alignment of {str(align)[:20]} cannot be")
        start = -(-file.tell() // align) * align
    end = 0
    for name, offset, length in sorted(extents, key=lambda extent: extent[1]):
        if offset % align or offset < end or start + offset + length > size:
            raise _bad(f"the tensor {name[:80]!r} lies outside the file or on top of another")
        end = offset + length
    if len({name for name, _, _ in extents}) != len(extents):
        raise _bad("two tensors have one name")
    return keys


def _tensor(reader: _Reader) -> tuple[str, int, int]:
    """Name, offset and length in bytes of one tensor."""
    name, dims = reader.text(), reader.number("<I")
    if not 1 <= dims <= 4:
        raise _bad(f"the tensor {name[:80]!r} has {dims} dimensions")
    sizes = [reader.number("<Q") for _ in range(dims)]
    kind, offset = reader.number("<I"), reader.number("<Q")
    if kind not in _BLOCKS:
        raise _bad(f"the tensor {name[:80]!r} has the number format {kind}, which is not read here")
    per_block, block_bytes = _BLOCKS[kind]
    numbers = 1
    for n in sizes:
        numbers *= n
    if not numbers or sizes[0] % per_block or numbers > reader.size * 32:
        raise _bad(f"the tensor {name[:80]!r} has sizes that cannot be")
    return name, offset, numbers // per_block * block_bytes
