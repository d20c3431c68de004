"""Exports a conversation of the playground as JSON lines or as Markdown, each answer with the proof of which weights gave it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from app.tables import Answer, Exchange

Thread = Sequence[tuple[Exchange, Sequence[Answer]]]


def as_jsonl(thread: Thread) -> str:
    """One line for each answer, in the order of the turns."""
    lines = [json.dumps(_answer(turn, exchange, a), ensure_ascii=False) for turn, (exchange, said) in enumerate(thread, 1) for a in said]
    return "\n".join(lines) + "\n"


def _answer(turn: int, exchange: Exchange, a: Answer) -> dict[str, Any]:
    names = ("revision", "adapter_sha256", "seed", "rendered_prompt", "text", "finish_reason", "error", "usage")
    return {
        "turn": turn,
        "prompt": exchange.prompt,
        "model": a.model_name,
        **{name: getattr(a, name) for name in names},
        **({"reasoning": a.reasoning} if a.reasoning else {}),
        "sampling": {k: v for k, v in exchange.sampling.items() if k not in ("models", "follows")},
        "created_at": int(a.created_at.timestamp()),
    }


def as_markdown(thread: Thread, title: str) -> str:
    """A document for people. Prompts and answers are in code fences, so none of them is read as Markdown."""
    parts = [f"# {' '.join(title.split())}", ""]
    for turn, (exchange, said) in enumerate(thread, 1):
        system = exchange.messages[0]["content"] if exchange.messages else ""
        parts += [f"## Turn {turn}", "", _fenced(exchange.prompt or ""), ""]
        parts += ["System message:", "", _fenced(system), ""] if system else []
        for a in said:
            parts += [f"### {a.model_name}", "", *_proof(exchange, a), ""]
            parts += ["Rendered prompt:", "", _fenced(a.rendered_prompt), ""] if a.rendered_prompt else []
            parts += ["Reasoning:", "", _fenced(a.reasoning), ""] if a.reasoning else []
            parts += ["Answer:", "", _fenced(a.text or (a.error or {}).get("message", "")), ""]
    return "\n".join(parts)


def _proof(exchange: Exchange, a: Answer) -> list[str]:
    """Full hashes and the settings, by which the answer can be reproduced."""
    engine = (a.usage or {}).get("engine")
    kept = {k: v for k, v in exchange.sampling.items() if k not in ("models", "follows", "seed") and v not in (None, [], False)}
    return [
        f"- revision {a.revision}",
        f"- adapter {a.adapter_sha256 or 'none: the base answered'}",
        f"- seed {a.seed}",
        f"- settings {json.dumps(kept, ensure_ascii=False)}",
        f"- ended by {a.finish_reason}" + (f", answered through {engine}" if engine else ""),
    ]


def _fenced(text: str) -> str:
    """In a fence longer than any run of backticks in the text."""
    longest = max((len(run) for run in _runs(text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _runs(text: str) -> list[str]:
    return re.findall(r"`+", text)
