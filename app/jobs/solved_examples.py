"""What a job saves for the first look at its model: validation questions with their reference answers, the system prompt of its
training rows, and the few-shot examples given to its base for the verdict.

The trainer writes it, where the rows are split anyway; `app/inference/tryout.py` reads it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from app import formats

MAX_QUESTIONS = 8
MAX_QUESTION_LENGTH, MAX_EXAMPLES_LENGTH = 4000, 20_000  # characters


class SolvedExample(NamedTuple):
    """A prompt as the model gets it, and the reference answer."""

    prompt: str | list[dict[str, Any]]
    reference: str


def with_examples(prompt: str | list[dict[str, Any]], examples: Sequence[SolvedExample]) -> str | list[dict[str, Any]]:
    """The prompt after few-shot examples: as earlier turns of a conversation, or as text."""
    if isinstance(prompt, str):
        return "".join(f"{e.prompt}{e.reference}\n\n" for e in examples) + prompt
    lead = 1 if prompt and prompt[0]["role"] == "system" else 0
    turns: list[dict[str, Any]] = []
    for example in examples:
        before = [m for m in example.prompt if isinstance(m, dict) and m["role"] != "system"] if not isinstance(example.prompt, str) else []
        turns += [*before, {"role": "assistant", "content": example.reference}]
    return [*prompt[:lead], *turns, *prompt[lead:]]


def of_rows(training: Iterable[Any], held: Iterable[Any]) -> dict[str, Any]:
    """`{"system", "questions", "examples"}` of a job's rows, each with `line` and `row`; the examples come with the verdict."""
    systems = Counter(question["system"] for row in training if (question := formats.of(row.row).exchange(row.row)))
    questions = [{"line": row.line, **question} for row in held if (question := formats.of(row.row).exchange(row.row))]
    brief = [q for q in questions if len(q["prompt"]) + len(q["reference"]) + len(q["system"]) <= MAX_QUESTION_LENGTH]
    return {"system": systems.most_common(1)[0][0] if systems else "", "questions": brief[:MAX_QUESTIONS], "examples": []}


def kept(examples: Sequence[SolvedExample]) -> dict[str, Any]:
    """The few-shot examples of a base; none where they are too long to keep."""
    shown = [example._asdict() for example in examples]
    return {"examples": shown if len(json.dumps(shown)) <= MAX_EXAMPLES_LENGTH else []}
