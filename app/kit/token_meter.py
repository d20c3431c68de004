"""A count of tokens that several threads add to, until somebody takes them down."""

from __future__ import annotations

import threading
from typing import TypedDict


class TokenCounts(TypedDict):
    read: int
    written: int
    encoded: int


class TokenMeter:
    """Tokens that models read in prompts and wrote in answers; `encoded` are those read of texts that were embedded or classified."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.read = self.written = self.encoded = 0

    def add(self, read: int, written: int = 0, encoded: int = 0) -> None:
        """Negative numbers take down what was counted elsewhere."""
        with self._lock:
            self.read += read
            self.written += written
            self.encoded += encoded

    def counts(self) -> TokenCounts:
        with self._lock:
            return {"read": self.read, "written": self.written, "encoded": self.encoded}
