"""Streams a model's folder as a zip: uncompressed, without a temporary file, in constant memory."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

from app.kit import manifest

_PIECE = 2**20
_DATE = (1980, 1, 1, 0, 0, 0)  # identical folders give identical archives
_LEFT_OUT = (manifest.NAME, manifest.SEEN, "README.md", "adapter_config.json")


class _Pipe:
    """A file object for zipfile; its bytes are taken out between two writes."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    def write(self, data: bytes) -> int:
        self.pieces.append(bytes(data))
        return len(data)

    def flush(self) -> None:
        pass

    def take(self) -> bytes:
        data, self.pieces = b"".join(self.pieces), []
        return data


def zip_of(folder: Path, readme: str, base: str | None = None) -> Iterator[bytes]:
    """The archive in pieces of about a megabyte. An adapter's config names `base` instead of a path of this machine."""
    pipe = _Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_STORED) as archive:  # type: ignore[call-overload]  # it only writes
        small = {"README.md": readme.encode()}
        if (folder / "adapter_config.json").is_file():
            config = json.loads((folder / "adapter_config.json").read_text())
            small["adapter_config.json"] = json.dumps({**config, "base_model_name_or_path": base}, indent=2).encode()
        for name, data in small.items():
            archive.writestr(zipfile.ZipInfo(name, _DATE), data)
        for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.relative_to(folder).as_posix() not in _LEFT_OUT):
            entry = zipfile.ZipInfo(path.relative_to(folder).as_posix(), _DATE)
            entry.file_size = path.stat().st_size
            with path.open("rb") as source, archive.open(entry, "w", force_zip64=entry.file_size >= 2**31) as target:
                while piece := source.read(_PIECE):
                    target.write(piece)
                    yield pipe.take()
    yield pipe.take()
