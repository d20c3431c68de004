"""Which strings of a dataset would save most tokens if they were new tokens of its model (`new_tokens` in `app/run_settings.py`)."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from app import formats
from app.new_tokens import fault
from worker.data.batch_rendering import counts_of

MAX_COUNTED = 2_000_000
"""Characters of a dataset that are looked at, its first ones: a string that matters is among them often."""
MAX_DISTINCT = 200_000
MIN_COUNT, MAX_TRIED, LISTED = 5, 500, 20
_STRING = re.compile(r"<[^<>\s]{1,40}>|\w{3,60}")
"""A tag, or a word."""


@dataclass(frozen=True)
class TokenSuggestion:
    """A string, how often it was found as a whole word or tag, and how many tokens fewer those places would have."""

    text: str
    count: int
    saved: int


class StringCounter:
    """Counts the words and tags of rows."""

    def __init__(self) -> None:
        self.characters = 0
        self._counts: Counter[str] = Counter()

    def add(self, row: dict[str, Any]) -> None:
        if self.characters >= MAX_COUNTED:
            return
        for _, text in formats.of(row).texts(row):
            self.characters += len(text)
            self._counts.update(_STRING.findall(text))
        if len(self._counts) > MAX_DISTINCT:  # what came once so far is let go of
            self._counts = Counter({word: count for word, count in self._counts.items() if count > 1})

    def suggestions(self, tokenizer: Any) -> list[TokenSuggestion]:
        """The strings that save most, first."""
        often = [(word, count) for word, count in self._counts.items() if count >= MIN_COUNT and fault(word) is None]
        tried = sorted(often, key=lambda found: -found[1] * len(found[0]))[:MAX_TRIED]
        if not tried:
            return []
        # A new token splits a text where it stands, and what is before and behind it is split as texts of their own.
        before, behind, *whole = counts_of(tokenizer, ["a ", " a", *(f"a {word} a" for word, _ in tried)])
        saved = [
            TokenSuggestion(word, count, count * (pieces - before - behind - 1)) for (word, count), pieces in zip(tried, whole, strict=True)
        ]
        return sorted((one for one in saved if one.saved > 0), key=lambda one: (-one.saved, one.text))[:LISTED]
