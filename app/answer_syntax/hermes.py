"""`<tool_call>{"name": …, "arguments": {…}}</tool_call>`, once for each call: Hermes, Qwen 2.5 and 3, and their fine-tunes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

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


def with_calls(content: str, calls: Sequence[Mapping[str, Any]] | None) -> str:
    """An answer with tool calls (OpenAI's, or `{"name", "arguments"}`) as one text, which graders read and pages show. All families'
    are written in this form."""
    form = Hermes().form("")

    def written(call: Mapping[str, Any]) -> str:
        name, arguments = json.dumps(call.get("name") or "", ensure_ascii=False)[1:-1], call.get("arguments")
        text = arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
        return form.before.replace(NAME, name) + text + form.after

    return "\n".join(part for part in (content.strip(), *(written(call.get("function") or call) for call in calls or ())) if part)
