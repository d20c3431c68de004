"""How much text rehearsal has: general rows that are played in against forgetting (`worker/training/rehearsal.py`)."""

from __future__ import annotations

PROMPTS = 96
"""General prompts that the base answers at most."""
ANSWER_TOKENS = 96
"""Tokens of an answer at most."""
ROW_TOKENS = 192
"""Tokens of a prompt with its answer at most, virtual tokens not counted."""
