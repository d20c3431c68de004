"""GGUF: one file per type, for llama.cpp and every program built on it (Ollama, LM Studio, Jan, KoboldCpp)."""

from __future__ import annotations

from collections.abc import Sequence

from app.export_formats._base import ExportFormat, ModelFacts, needs_merging
from app.languages import gettext, mark

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3"}
"""`model_type` of transformers → `general.architecture` of llama.cpp."""

BITS = {
    "Q8_0": 8.5, "F16": 16.0, "BF16": 16.0, "F32": 32.0, "Q6_K": 6.6, "Q5_K_M": 5.7, "Q4_K_M": 4.9, "Q4_0": 4.6, "IQ4_XS": 4.5,
}  # fmt: skip
"""Bits per weight of the layers' matrices; rows that do not divide into blocks take up to a bit more."""
OUTPUT_BITS = {"F32": 32.0, "F16": 16.0, "BF16": 16.0}
"""Bits per weight of the output matrix, which the quantized types keep in Q6_K or Q8_0."""


class Gguf(ExportFormat):
    name, title, place, proves = "gguf", "GGUF", 10, True
    summary = mark("One file per type, for llama.cpp, Ollama, LM Studio and others that run models on a CPU or a small GPU.")
    types = tuple(BITS)
    weighted = ("Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_XS")

    def accepts(self, facts: ModelFacts) -> str | None:
        if facts.labels:
            return gettext("It has an output layer of its own, which llama.cpp cannot read.")
        if facts.shape.model_type not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            return gettext(
                "Its architecture, %(architecture)s, is not one of those that are written here: %(known)s.",
                architecture=facts.shape.model_type,
                known=known,
            )
        if facts.shape.mlp_bias:
            return gettext("Its feed-forward layers have biases, which llama.cpp's graph of this architecture lacks.")
        return needs_merging(facts)

    def bytes_of(self, facts: ModelFacts, types: Sequence[str]) -> int:
        output = facts.shape.vocabulary * facts.shape.hidden
        others = facts.shape.parameters() - output
        weights = sum((others * (BITS[name] + 1) + output * OUTPUT_BITS.get(name, 8.5)) / 8 for name in types)
        return round(weights) + 40 * facts.shape.vocabulary * len(types)  # the vocabulary with its merges


FORMAT = Gguf()
