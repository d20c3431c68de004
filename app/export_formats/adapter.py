"""An adapter as the peft library saves it, for peft, vLLM and SGLang on its base."""

from __future__ import annotations

from collections.abc import Sequence

from app.export_formats._base import ExportFormat, ModelFacts, tokens_apart


class PeftAdapter(ExportFormat):
    name, title, place, merged = "adapter", "Adapter", 35, False
    summary = "The adapter alone, in the layout of the peft library, with its tokenizer and the public name of its base."
    types = ("PEFT",)

    def accepts(self, facts: ModelFacts) -> str | None:
        if not facts.strategies:
            return "It is not an adapter."
        if len(facts.strategies) > 1:
            return f"It is an adapter on another one ({' on '.join(facts.strategies[::-1])}), and peft loads it on plain weights."
        if not facts.peft:
            return f"peft has no layout for what {facts.strategies[0]} trains."
        return tokens_apart(facts, "peft")

    def bytes_of(self, facts: ModelFacts, types: Sequence[str]) -> int:
        return facts.shape.parameters() // 2 + 200 * facts.shape.vocabulary


FORMAT = PeftAdapter()
