"""ONNX: one file that computes vectors of an embedding model, or the probabilities of a classifier, in any language's runtime."""

from __future__ import annotations

from collections.abc import Sequence

from app.export_formats._base import ExportFormat, ModelFacts, needs_merging
from app.languages import gettext, mark


class Onnx(ExportFormat):
    name, title, place = "onnx", "ONNX", 45
    summary = mark("Embedding models and classifiers as one file for onnxruntime, in Python, JavaScript, C# or Java, without torch.")
    types = ("F32",)

    def accepts(self, facts: ModelFacts) -> str | None:
        if facts.kind != "encoder" and not facts.labels:
            return gettext("Only embedding models and classifiers are written in it; export a model that writes text as GGUF.")
        if facts.kind == "reward":
            return gettext("A reward model reads conversations, and its one number is no probability.")
        return needs_merging(facts)

    def bytes_of(self, facts: ModelFacts, types: Sequence[str]) -> int:
        return 4 * facts.shape.parameters() + 200 * facts.shape.vocabulary


FORMAT = Onnx()
