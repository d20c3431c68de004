"""As much of Go's text/template as the templates of `worker/exporters/_go_template.py` use, so that they can be rendered beside Jinja.

Actions: range with and without variables, if, else if, else, end, fields, `eq`, `ne`, `and`, trimming by `{{-` and `-}}`
(https://pkg.go.dev/text/template). Anything else is an error, so that a template cannot pass by being misread.
"""

from __future__ import annotations

import re
from typing import Any

ACTION = re.compile(r"\{\{(-?)\s*(.*?)\s*(-?)\}\}", re.DOTALL)


def render(template: str, messages: list[dict[str, str]]) -> str:
    """What Ollama fills in: Messages, and System with what the system messages say (`collate` in its template.go)."""
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    root = {"Messages": [{"Role": m["role"], "Content": m["content"]} for m in messages], "System": system}
    nodes, rest = parse(tokens(template))
    assert not rest, rest
    return "".join(run(nodes, root, {"$": root}))


def tokens(template: str) -> list[tuple[str, str]]:
    found, at, trim = [], 0, False
    for match in ACTION.finditer(template):
        text = template[at : match.start()]
        text = text.lstrip(" \t\r\n") if trim else text
        found.append(("text", text.rstrip(" \t\r\n") if match[1] else text))
        found.append(("do", match[2]))
        at, trim = match.end(), bool(match[3])
    found.append(("text", template[at:].lstrip(" \t\r\n") if trim else template[at:]))
    return found


def parse(rest: list[tuple[str, str]]) -> tuple[list[Any], list[tuple[str, str]]]:
    """Nodes up to an `else` or `end`, and what comes from there on."""
    nodes: list[Any] = []
    while rest and not (rest[0][0] == "do" and rest[0][1].split(" ")[0] in ("else", "end")):
        if rest[0][0] == "do" and rest[0][1].split(" ")[0] in ("range", "if"):
            node, rest = parse_block(rest)
            nodes.append(node)
        else:
            nodes.append(rest[0])
            rest = rest[1:]
    return nodes, rest


def parse_block(rest: list[tuple[str, str]]) -> tuple[Any, list[tuple[str, str]]]:
    """One `range` or `if` with its branches, and what comes after its `end`."""
    word, _, what = rest[0][1].partition(" ")
    inside, rest = parse(rest[1:])
    if rest[0][1].startswith("else if "):  # which ends with the same `end`
        node, rest = parse_block([("do", rest[0][1].removeprefix("else ")), *rest[1:]])
        return (word, what, inside, [node]), rest
    otherwise: list[Any] = []
    if rest[0][1] == "else":
        otherwise, rest = parse(rest[1:])
    assert rest[0][1] == "end", rest[0]
    return (word, what, inside, otherwise), rest[1:]


def run(nodes: list[Any], dot: Any, names: dict[str, Any]) -> list[str]:
    out: list[str] = []
    for node in nodes:
        if node[0] == "text":
            out.append(node[1])
        elif node[0] == "do":
            out.append(str(value(node[1], dot, names)))
        elif node[0] == "if":
            out += run(node[2] if value(node[1], dot, names) else node[3], dot, names)
        else:
            declared, _, what = node[1].rpartition(":=")
            for place, item in enumerate(value(what.strip(), dot, names)):
                here = dict(names)
                if declared:
                    first, second = (name.strip() for name in declared.split(","))
                    here |= {first: place, second: item}
                out += run(node[2], item, here)
    return out


def value(text: str, dot: Any, names: dict[str, Any]) -> Any:
    words = re.findall(r'"[^"]*"|\([^()]*\)|\S+', text)
    if words[0] in ("eq", "ne", "and"):
        a, b = (value(w.strip("()"), dot, names) if w.startswith("(") else value(w, dot, names) for w in words[1:])
        return a == b if words[0] == "eq" else a != b if words[0] == "ne" else a and b
    assert len(words) == 1, text
    word = words[0]
    if word.startswith('"'):
        return word[1:-1]
    if word.isdigit():
        return int(word)
    if word.startswith("."):
        return dot[word[1:]]
    name, _, field = word.partition(".")
    return names[name][field] if field else names[name]
