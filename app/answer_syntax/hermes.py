"""`<tool_call>{"name": …, "arguments": {…}}</tool_call>`, once for each call: Hermes, Qwen 2.5 and 3, and their fine-tunes."""

from __future__ import annotations

from typing import ClassVar

from app.answer_syntax._base import NAME, CallForm, Family


class Hermes(Family):
    name: ClassVar = "hermes"
    place: ClassVar = 10
    opens = "<tool_call>"
    closes: str | None = "</tool_call>"

    def writes(self, template: str) -> bool:
        return self.opens in template and "<function=" not in template

    def form(self, template: str) -> CallForm:
        before = f'{self.opens}\n{{"name": "{NAME}", "arguments": '
        return CallForm(before, f"}}\n{self.closes}", between="\n")
