"""The folder layout of sentence-transformers, for encoders."""

from __future__ import annotations

from collections.abc import Sequence

from app.export_formats._base import ExportFormat, ModelFacts, needs_merging
from app.languages import gettext, mark


class SentenceTransformers(ExportFormat):
    name, title, place = "sentence_transformers", "sentence-transformers", 40
    summary = mark("A folder that SentenceTransformer(…) and vector databases load, with mean pooling and unit length as here.")
    types = ("F32",)

    def accepts(self, facts: ModelFacts) -> str | None:
        if facts.kind != "encoder" or facts.labels:
            return gettext("Only embedding models have this layout.")
        return needs_merging(facts)

    def bytes_of(self, facts: ModelFacts, types: Sequence[str]) -> int:
        return 4 * facts.shape.parameters() + 200 * facts.shape.vocabulary


FORMAT = SentenceTransformers()
