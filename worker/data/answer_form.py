"""How the model of a tokenizer writes reasoning and tool calls, by the tokenizer's own description or its chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from app.answer_syntax import FAMILIES, Family, Syntax, ToolCall, family_of, thought_markers
from app.answer_syntax._splitter import Said, Splitter
from app.answer_syntax.hermes import with_calls
from worker.data.chat_template import template_of


def family(tokenizer: Any) -> Family | None:
    """The family of the tool calls that a model writes."""
    return family_of(template_of(tokenizer), getattr(tokenizer, "response_template", None))


def thought(tokenizer: Any) -> tuple[str, str] | None:
    """The markers around a model's reasoning."""
    return thought_markers(template_of(tokenizer), getattr(tokenizer, "response_template", None))


def syntax(tokenizer: Any, prompt: str, *, tools: bool, parallel: bool = True) -> Syntax | None:
    """How the answer to a rendered `prompt` is divided; None where there is nothing to divide."""
    calls, marks = family(tokenizer) if tools else None, thought(tokenizer)
    if calls is None and marks is None:
        return None
    return Syntax(
        thought=marks,
        in_thought=marks is not None and prompt.rstrip().endswith(marks[0].rstrip()),
        calls=calls.name if calls else None,
        call_markers=(calls.opens, calls.closes) if calls and calls.name not in FAMILIES and calls.closes else None,
        parallel=parallel,
    )


def hidden_tokens(tokenizer: Any, syntax: Syntax | None) -> frozenset[int] | None:
    """The special tokens that are no part of an answer's text, where some of its markers are special; None where none is."""
    shown = special_markers(tokenizer, syntax)
    special = set(tokenizer.all_special_ids) | {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(special - shown) if shown else None


def special_markers(tokenizer: Any, syntax: Syntax | None) -> set[int]:
    """Ids of the markers of a syntax that are special tokens."""
    names = {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {names[marker] for marker in (syntax.markers if syntax else ()) if marker in names}


def in_one_form(tokenizer: Any, ids: Sequence[int], tools: Sequence[Mapping[str, Any]]) -> str:
    """The text of an answer to a prompt with `tools`, its calls as `with_calls` writes them and its reasoning left out. An answer
    without a call that can be read is the text that the model wrote."""
    form = syntax(tokenizer, "", tools=True)
    hidden = hidden_tokens(tokenizer, form)
    if hidden is None:
        text = tokenizer.decode(ids, skip_special_tokens=True)
    else:
        text = tokenizer.decode([i for i in ids if i not in hidden], skip_special_tokens=False)
    if form is None or form.calls is None:
        return text.strip()
    splitter = Splitter(form, tools)
    parts = [*splitter.push(text), *splitter.end()]
    calls = [{"name": part.name, "arguments": part.arguments} for part in parts if isinstance(part, ToolCall)]
    if not calls:
        return text.strip()
    return with_calls("".join(part.text for part in parts if isinstance(part, Said)), calls)
