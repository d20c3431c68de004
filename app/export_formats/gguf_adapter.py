"""A LoRA adapter as GGUF, for llama.cpp's `--lora` on a GGUF file of its base."""

from __future__ import annotations

from collections.abc import Sequence

from app.export_formats._base import ExportFormat, ModelFacts, tokens_apart
from app.export_formats.gguf import FORMAT as GGUF
from app.languages import gettext, mark

PLAIN_LORA = ("lora", "rslora", "qlora")
"""Strategies whose result is two matrices for each layer and nothing else."""


class GgufAdapter(ExportFormat):
    name, title, place, merged, proves = "gguf_adapter", mark("GGUF adapter"), 30, False, True
    summary = mark("The LoRA matrices alone, a few megabytes, for llama.cpp's --lora next to a GGUF file of the base.")
    types = ("F16", "F32")

    def accepts(self, facts: ModelFacts) -> str | None:
        if not facts.strategies:
            return gettext("It is not an adapter.")
        if len(facts.strategies) > 1 or facts.strategies[0] not in PLAIN_LORA:
            return gettext(
                "llama.cpp applies one LoRA adapter (%(able)s) to a base, and this is %(adapters)s.",
                able=", ".join(PLAIN_LORA),
                adapters=" on ".join(facts.strategies[::-1]),
            )
        return tokens_apart(facts, "llama.cpp") or GGUF.accepts(facts)

    def bytes_of(self, facts: ModelFacts, types: Sequence[str]) -> int:
        return facts.shape.parameters() // 4 + GGUF.bytes_of(facts, ["F16"])  # the base is written too, to run the adapter on


FORMAT = GgufAdapter()
