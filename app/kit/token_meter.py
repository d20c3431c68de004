"""A count of tokens that several threads add to, until somebody takes them down."""

from __future__ import annotations

import threading


class TokenMeter:
    """Tokens that models read in prompts and wrote in answers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.read = self.written = 0

    def add(self, read: int, written: int) -> None:
        """Negative numbers take down what was counted elsewhere."""
        with self._lock:
            self.read += read
            self.written += written
