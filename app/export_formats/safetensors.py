"""Merged weights as transformers, vLLM and SGLang load them: a folder per type."""

from __future__ import annotations

from collections.abc import Sequence

from app.export_formats._base import ExportFormat, ModelFacts, needs_merging
from app.languages import mark

BYTES = {"BF16": 2, "F16": 2, "F32": 4}


class Safetensors(ExportFormat):
    name, title, place, proves = "safetensors", mark("Merged safetensors"), 25, True
    summary = mark("The weights with every adapter merged, its tokenizer and config, for transformers, vLLM and SGLang.")
    types = tuple(BYTES)

    def accepts(self, facts: ModelFacts) -> str | None:
        return needs_merging(facts)

    def bytes_of(self, facts: ModelFacts, types: Sequence[str]) -> int:
        return sum(BYTES[name] for name in types) * facts.shape.parameters() + 200 * facts.shape.vocabulary * len(types)


FORMAT = Safetensors()
