"""What a model's chat template knows of tools and thinking, and what a request makes of it: how its answer is written and divided.

A template is asked and not read: a short conversation is rendered with tools and without, with thinking on and off, and where the
texts are the same it does not know them.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from app.answer_syntax import Syntax
from app.errors import BadData, BadRequest
from app.inference.protocol import GenerateRequest
from worker.data import answer_form, template_pool
from worker.data.answer_form import family, thought
from worker.data.chat_template import template_of
from worker.data.template_pool import SECONDS, TemplateInput

SWITCHES = ("enable_thinking", "thinking")
"""Variables with which chat templates switch thinking on and off."""
LEVEL = "reasoning_effort"
_ASKED = [{"role": "user", "content": "a"}]
_TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"x": {"type": "string"}}}},
}


class Abilities(NamedTuple):
    """What a chat template knows: tools, the variable that switches thinking, and levels of effort."""

    tools: bool
    switch: str | None
    levels: bool


def abilities(tokenizer: Any) -> Abilities:
    """Found out once for each tokenizer and template. Raises Unavailable where no process is free to render."""
    template = template_of(tokenizer)
    known, found = _known.get(tokenizer, ("", None))
    if found is None or known != template:
        found = _find_out(tokenizer, template)
        _known[tokenizer] = (template, found)
    return found


_known: WeakKeyDictionary[Any, tuple[str, Abilities | None]] = WeakKeyDictionary()


def _find_out(tokenizer: Any, template: str) -> Abilities:
    def text(tools: list[Any] | None = None, **options: bool | str) -> str | None:
        try:
            return template_pool.write(
                tokenizer, template, TemplateInput(_ASKED, tools, generate=True, options=options), seconds=SECONDS
            ).text
        except BadData:
            return None

    plain = text()
    with_tools = text([_TOOL]) if "tools" in template else plain
    switch = next((name for name in SWITCHES if name in template and text(None, **{name: True}) != text(None, **{name: False})), None)
    levels = LEVEL in template and text(None, **{LEVEL: "low"}) != text(None, **{LEVEL: "high"})
    return Abilities(tools=with_tools not in (None, plain), switch=switch, levels=levels)


def options_of(request: GenerateRequest, tokenizer: Any) -> dict[str, bool | str]:
    """The variables of the chat template that the request's effort sets. Raises BadRequest for an effort that it does not know."""
    if request.effort is None or request.messages is None:
        return {}
    able = abilities(tokenizer)
    if able.levels:
        levels: dict[str, bool | str] = {LEVEL: request.effort}
        return levels | ({able.switch: request.effort != "none"} if able.switch else {})
    if able.switch:
        return {able.switch: request.effort != "none"}
    if request.effort == "none" and thought(tokenizer) is None:
        return {}
    knows = "cannot be kept from thinking" if request.effort == "none" else "knows no reasoning_effort"
    raise BadRequest(
        f"{request.model.name} {knows}: its chat template has no {SWITCHES[0]} and no {LEVEL}.",
        hint="Omit reasoning_effort, or choose a model whose chat template has one of them.",
        param="reasoning_effort",
        code="unsupported_parameter",
    )


def check_tools(request: GenerateRequest, tokenizer: Any) -> None:
    """Raises BadRequest where the model cannot be told of the request's tools, or writes calls that cannot be read."""
    if not request.tools or not request.split:
        return
    if not abilities(tokenizer).tools:
        raise BadRequest(
            f"The chat template of {request.model.name} knows no tools.",
            hint="Omit tools, or choose a model whose chat template takes them, as those of Qwen, Llama 3.1 and Mistral do.",
            param="tools",
            code="unsupported_parameter",
        )
    if family(tokenizer) is None:
        raise BadRequest(
            f"{request.model.name} writes tool calls in a form that the studio cannot read.",
            hint="Send tool_choice none to get text, or choose a model of the families hermes, qwen, llama 3 and mistral.",
            param="tools",
            code="unsupported_parameter",
        )


def messages_of(request: GenerateRequest, tokenizer: Any) -> list[dict[str, Any]]:
    """The request's messages as the chat templates of the model's family take them."""
    messages = request.messages or []
    used = any(message.get("tool_calls") or message.get("tool_call_id") for message in messages)
    writes = family(tokenizer) if used else None
    return writes.messages(messages) if writes else messages


def syntax_of(request: GenerateRequest, tokenizer: Any, prompt: str) -> Syntax | None:
    """How the answer to a rendered `prompt` is divided; None where it is not, and where there is nothing to divide."""
    if not request.split or request.messages is None:
        return None
    found = answer_form.syntax(tokenizer, prompt, tools=bool(request.tools), parallel=request.tool_use.parallel)
    if found is None or found.family is None or found.family.elements or request.tool_use.calls != "required":
        return found
    return found.model_copy(update={"forced": found.family.form(template_of(tokenizer))})
