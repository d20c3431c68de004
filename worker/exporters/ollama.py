"""A GGUF file per type, and for each a Modelfile: template, stops, system prompt, parameters, license."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from app.errors import Unsupported
from app.export_formats import FORMATS
from worker import exporters
from worker.exporters import _go_template
from worker.exporters._base import Exporter, ExportOptions, Progress, WrittenFile

CONTEXT = 8192
"""Tokens that Ollama holds in memory; a larger context is the reader's to choose."""
SAMPLING = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "repetition_penalty": "repeat_penalty"}


class OllamaExporter(Exporter):
    format = FORMATS["ollama"]

    def write(self, source: Path, into: Path, options: ExportOptions, progress: Progress) -> Sequence[WrittenFile]:
        """The template is settled first: a model whose template has no known equal in Go is refused before its weights are written."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        found = _go_template.find(tokenizer)
        written = list(exporters.get("gguf").write(source, into, options, progress))
        for one in tuple(written):
            name = "Modelfile" if len(options.types) == 1 else f"Modelfile-{one.type}"
            (into / name).write_text(modelfile(one.name, found, source, options))
            written.append(WrittenFile(name, one.type, (f"The template is the family {found.family}.",) if found.family else ()))
        return written


EXPORTER = OllamaExporter()


def modelfile(weights: str, found: _go_template.GoTemplate, source: Path, options: ExportOptions) -> str:
    """The text of a Modelfile (https://github.com/ollama/ollama/blob/main/docs/modelfile.md)."""
    lines = [f"FROM ./{weights}", f"TEMPLATE {quoted(found.template)}"]
    if system := options.system or found.system:
        lines.append(f"SYSTEM {quoted(system)}")
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in found.stops]
    lines += [f"PARAMETER {name} {value}" for name, value in parameters(source).items()]
    if options.license:
        lines.append(f"LICENSE {quoted(options.license)}")
    return "\n".join(lines) + "\n"


def parameters(source: Path) -> dict[str, Any]:
    """The context, and how the model's own generation config samples."""
    config = json.loads((source / "config.json").read_text())
    path = source / "generation_config.json"
    given = json.loads(path.read_text()) if path.is_file() else {}
    numbers = {ours: given[name] for name, ours in SAMPLING.items() if isinstance(given.get(name), int | float)}
    return {"num_ctx": min(CONTEXT, config["max_position_embeddings"]), **(numbers if given.get("do_sample", True) else {})}


def quoted(text: str) -> str:
    """A text in three quotation marks, which cannot hold three of them."""
    if '"""' in text:
        raise Unsupported("The template or system prompt holds three quotation marks, which a Modelfile cannot.", hint="Change it.")
    return f'"""{text}"""'
