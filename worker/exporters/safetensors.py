"""Merged weights in one dtype per folder: at the root for one type, in a folder of its name for each of several."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from app.export_formats import FORMATS
from worker.exporters._base import ExportedModel, Exporter, ExportOptions, Progress, WrittenFile
from worker.exporters._folder import WEIGHTS, copy_others, write_weights
from worker.exporters._gguf_tokenizer import ends_of


class SafetensorsExporter(Exporter):
    format = FORMATS["safetensors"]
    program = "transformers"

    def write(self, source: Path, into: Path, options: ExportOptions, progress: Progress) -> Sequence[WrittenFile]:
        """Raises Unsupported for a weight that exceeds a type's range."""
        written = []
        for place, kind in enumerate(options.types):

            def share(done: float, place: int = place, kind: str = kind) -> None:
                progress((place + done) / len(options.types), f"Writing {kind}")

            folder = into if len(options.types) == 1 else into / kind
            folder.mkdir(exist_ok=True)
            copy_others(source, folder, WEIGHTS.fullmatch)
            write_weights(source, folder, kind, share)
            if options.generates:
                name_ends(source, folder)
            written += [WrittenFile(path.relative_to(into).as_posix(), kind) for path in sorted(folder.iterdir()) if path.is_file()]
        return written

    def run(self, into: Path, one: WrittenFile, work: Path, options: ExportOptions) -> ExportedModel | None:
        """Once per folder."""
        path = into / one.name
        return ExportedModel(path.parent) if path.name == "config.json" else None


EXPORTER = SafetensorsExporter()


def name_ends(source: Path, folder: Path) -> None:
    """Write every token that ends an answer into the generation config, where `generate` and servers look for them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    path = folder / "generation_config.json"
    config: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**config, "eos_token_id": ends_of(source, tokenizer)}, indent=2, sort_keys=True) + "\n")
