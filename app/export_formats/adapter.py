"""An adapter as the peft library saves it, for peft, vLLM and SGLang on its base."""

from __future__ import annotations

from collections.abc import Sequence

from app.export_formats._base import ExportFormat, ModelFacts, tokens_apart
from app.languages import gettext, mark


class PeftAdapter(ExportFormat):
    name, title, place, merged = "adapter", mark("Adapter"), 35, False
    summary = mark("The adapter alone, in the layout of the peft library, with its tokenizer and the public name of its base.")
    types = ("PEFT",)

    def accepts(self, facts: ModelFacts) -> str | None:
        if not facts.strategies:
            return gettext("It is not an adapter.")
        if len(facts.strategies) > 1:
            return gettext(
                "It is an adapter on another one (%(adapters)s), and peft loads it on plain weights.",
                adapters=" on ".join(facts.strategies[::-1]),
            )
        if not facts.peft:
            return gettext("peft has no layout for what %(method)s trains.", method=facts.strategies[0])
        return tokens_apart(facts, "peft")

    def bytes_of(self, facts: ModelFacts, types: Sequence[str]) -> int:
        return facts.shape.parameters() // 2 + 200 * facts.shape.vocabulary


FORMAT = PeftAdapter()
