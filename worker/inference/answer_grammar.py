"""The grammar of an answer that calls tools, in llguidance's form of Lark
(https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md).

    calls: required       [reasoning] calls
    calls: auto, strict   [reasoning] (text | text calls)
    with a JSON schema    [reasoning] (JSON | calls), or JSON alone where no tools are

Reasoning is part of it only where the prompt has opened it. The parameters of each function are a schema of their own, because
a `$ref` leads from the root of its schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from app.answer_syntax import NAME, CallForm, Family, Syntax
from app.inference.protocol import GenerateRequest
from worker.inference import element_grammar as elements
from worker.inference.element_grammar import json_rule

SPACES = r"[ \n]{0,24}"
"""White space between the parts of JSON: enough to indent, and not so much that a small model writes nothing else."""
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
_FREE = {"type": "object"}
Piece = Callable[[str], str]


def grammar_of(request: GenerateRequest, syntax: Syntax | None, template: str, tokenizer: Any) -> str | None:
    """The grammar of the answer to a request; None where a JSON schema alone constrains it, or nothing does."""
    family, schema = syntax.family if syntax else None, request.sampling.json_schema
    calls = family is not None and (request.tool_use.constrains or schema is not None)
    thinks = syntax is not None and syntax.in_thought and (calls or schema is not None)
    if not calls and not thinks:
        return None
    piece = _pieces(tokenizer)
    rules = {"start": _body(request, calls), "TEXT": r"/(.|\n)*/"}
    if schema is not None:
        rules["json_answer"] = _json(schema)
    if calls and family is not None:
        rules |= _calls(family, request, template, piece)
    if syntax is not None and syntax.thought and thinks:
        rules |= {"body": rules["start"], "start": 'thought_end "\\n\\n" body', **_until("thought_end", syntax.thought[1], piece)}
    return "%llguidance {}\n" + "".join(f"{name}: {text}\n" for name, text in rules.items())


def _body(request: GenerateRequest, calls: bool) -> str:
    """What an answer may be after its reasoning."""
    if calls and request.tool_use.calls == "required":
        return "calls"
    if request.sampling.json_schema is not None:
        return "json_answer | calls" if calls else "json_answer"
    return "free"


def _calls(family: Family, request: GenerateRequest, template: str, piece: Piece) -> dict[str, str]:
    """The rules `calls` and, for answers that need not call, `free`."""
    form, functions = family.form(template), _functions(request)
    many = form.between is not None and request.tool_use.parallel
    rules: dict[str, str] = {}
    for place, function in enumerate(functions):
        before = form.before.replace(NAME, function["name"])
        parameters = _parameters(function, request)
        if family.elements:
            rules |= elements.rules(f"arguments_{place}", parameters, function["name"], SPACES)
        else:
            rules[f"arguments_{place}"] = _json(parameters)
        rules[f"call_{place}"] = f"{piece(before)} arguments_{place} {piece(form.after)}"
    rules["call"] = " | ".join(f"call_{place}" for place in range(len(functions)))
    rules["calls"] = _sequence(form, "call", many, piece, form.first)
    if request.tool_use.calls == "required" or request.sampling.json_schema is not None:
        return rules
    if family.bare:
        return rules | {"free": "WORDS | calls", "WORDS": r"/([ \n\t]*[^\{ \n\t](.|\n)*)?/"}
    return rules | _free(family, form, functions, many, piece)


def _free(family: Family, form: CallForm, functions: Sequence[dict[str, Any]], many: bool, piece: Piece) -> dict[str, str]:
    """Text, in which the family's marker begins calls and nothing else."""
    rules = {"free": "TEXT | opened rest", **_until("opened", family.opens, piece)}
    if form.first:
        return rules | {"rest": _sequence(form, "call", many, piece, form.first.removeprefix(family.opens))}
    for place, function in enumerate(functions):
        before = form.before.replace(NAME, function["name"]).removeprefix(family.opens)
        rules[f"first_{place}"] = f"{piece(before)} arguments_{place} {piece(form.after)}"
    firsts = " | ".join(f"first_{place}" for place in range(len(functions)))
    return rules | {"rest": _sequence(form, f"({firsts})", many, piece, "")}


def _sequence(form: CallForm, begin: str, many: bool, piece: Piece, first: str) -> str:
    further = f"({piece(form.between or '')} call)*" if many else ""
    return f"{piece(first)} {begin} {further} {piece(form.last)}".strip()


def _until(name: str, marker: str, piece: Piece) -> dict[str, str]:
    """A rule for any text that ends with a marker."""
    found = piece(marker)
    return {name: f"TEXT {found}"} if found.startswith("<") else {f"{name}[lazy]": f"TEXT {found}"}


def _functions(request: GenerateRequest) -> list[dict[str, Any]]:
    """The functions that may be called."""
    functions = [tool["function"] for tool in request.tools or []]
    named = request.tool_use.function
    return [function for function in functions if named in (None, function["name"])]


def _parameters(function: dict[str, Any], request: GenerateRequest) -> dict[str, Any]:
    """The schema of a function's arguments. Where calls are not required, one that is not strict may have any arguments."""
    if request.tool_use.calls == "auto" and function["name"] not in request.tool_use.strict:
        return _FREE
    parameters: dict[str, Any] = function.get("parameters") or _NO_PARAMETERS
    return parameters if "type" in parameters else {"type": "object", **parameters}


def _json(schema: dict[str, Any]) -> str:
    return json_rule(schema, SPACES)


def _pieces(tokenizer: Any) -> Piece:
    """Writes a text as a sequence of Lark's terminals: a marker that is one token of the vocabulary as that token, and the rest as strings."""
    names = {str(token): i for i, token in tokenizer.added_tokens_decoder.items()}
    pattern = "|".join(map(re.escape, sorted(filter(None, names), key=lambda name: -len(name))))

    def piece(text: str) -> str:
        parts = re.split(f"({pattern})", text) if pattern else [text]
        return " ".join(f"<[{names[part]}]>" if part in names else json.dumps(part) for part in parts if part)

    return piece
