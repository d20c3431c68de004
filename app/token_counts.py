"""Tokens of a dataset as a model counts them, without torch or transformers: the tokenizer's own file and the template."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from app.formats._base import Row
from app.formats.preference import conversation_with
from app.report import texts


class TokenCounter:
    """Tokens as a model counts them: each row through its chat template, when it has one, and its tokenizer.

    The template is a program from elsewhere; it runs in Jinja's sandbox, and this process has limits.
    """

    def __init__(self, folder: Path) -> None:
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        config = json.loads((folder / "tokenizer_config.json").read_text()) if (folder / "tokenizer_config.json").exists() else {}
        template = (
            (folder / "chat_template.jinja").read_text() if (folder / "chat_template.jinja").exists() else config.get("chat_template")
        )
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        self.template = environment.from_string(template) if isinstance(template, str) else None
        self.marks = {name: _token_text(config.get(name)) for name in ("bos_token", "eos_token")}
        self.tokens = self.trained = self.longest = 0
        self.lengths: Counter[int] = Counter()
        self._whole: list[str] = []
        self._answers: list[list[str]] = []

    def add(self, row: Row) -> None:
        # A pair of answers is two sequences, each with the prompt, as the trainer reads them.
        answers = [name for name in ("chosen", "rejected", "answer") if name in row]
        for one in [conversation_with(row, name) for name in answers] or [row]:
            self._whole.append(self._render(one))
            self._answers.append(_answers(one))
        if len(self._whole) >= 256:
            self._count()

    def _render(self, row: Row) -> str:
        if self.template is not None and "messages" in row:
            try:
                return self.template.render(messages=row["messages"], tools=row.get("tools"), add_generation_prompt=False, **self.marks)
            except Exception:  # the trainer says which rows its template refuses; a count needs no more than the texts
                return _plain(row)
        return _plain(row)

    def _count(self) -> None:
        answers = [text for row in self._answers for text in row]
        whole = self.tokenizer.encode_batch_fast(self._whole, add_special_tokens=False)
        parts = self.tokenizer.encode_batch_fast(answers, add_special_tokens=False)
        # Each answer also learns the token that ends it.
        self.trained += sum(len(part.ids) + 1 for part in parts)
        for encoding in whole:
            length = len(encoding.ids)
            self.tokens += length
            self.longest = max(self.longest, length)
            self.lengths[length.bit_length()] += 1
        self._whole, self._answers = [], []

    def result(self) -> dict[str, Any]:
        self._count()
        lengths = [[0 if bits == 0 else 1 << (bits - 1), count] for bits, count in sorted(self.lengths.items())]
        return {"tokens": self.tokens, "trained_tokens": min(self.trained, self.tokens), "longest": self.longest, "token_lengths": lengths}


def _plain(row: Row) -> str:
    return "\n".join(text for _, text in texts(row))


def _token_text(value: Any) -> str:
    return value.get("content", "") if isinstance(value, dict) else (value or "")


def _answers(row: Row) -> list[str]:
    """The texts of a row whose tokens are learnt."""
    if "completion" in row:
        return [row["completion"]]
    if "text" in row:
        return [] if "label" in row else [row["text"]]
    return [message["content"] for message in row["messages"] if message["role"] == "assistant" and message.get("weight") != 0]
