"""New tokens of a job: strings that become one token each of its model. Here is what can be said of them without a tokenizer."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

MAX_TOKENS, MAX_CHARACTERS = 1000, 100
PRIVATE = ("\ue000", "\uf8ff")
"""Characters of private use, which stand for special tokens while a conversation is rendered (`worker/data/special_tokens.py`)."""


def _lines(value: Any) -> Any:
    """The lines of a text, as a form sends them; other values unchanged."""
    return [line.strip() for line in value.splitlines() if line.strip()] if isinstance(value, str) else value


def _checked(tokens: tuple[str, ...]) -> tuple[str, ...]:
    if not 0 < len(tokens) <= MAX_TOKENS:
        raise ValueError(f"It takes 1 to {MAX_TOKENS} strings, and these are {len(tokens):,}: omit it to add none")
    for place, token in enumerate(tokens):
        if reason := fault(token):
            raise ValueError(f"String {place + 1} {reason}")
        if token in tokens[:place]:
            raise ValueError(f"“{token}” is there twice: name each string once")
    return tokens


def fault(token: str) -> str | None:
    """Why a string cannot be a token, as the rest of a sentence that begins with the string; None where it can."""
    if not token.strip():
        return "is empty or only white space: a token needs a visible character"
    if len(token) > MAX_CHARACTERS:
        return f"has {len(token):,} characters, and a token may have {MAX_CHARACTERS}: shorten it"
    if token != token.strip():
        return "begins or ends with white space, which stays a token of its own: omit it"
    if not token.isprintable() or any(PRIVATE[0] <= character <= PRIVATE[1] for character in token):
        return "has a line break or another character that cannot be seen: omit that"
    if "<|" in token or "|>" in token:
        return "has the form of a special token (<|…|>), which only a chat template writes: spell it <name>"
    return None


NewTokens = Annotated[tuple[str, ...], BeforeValidator(_lines), AfterValidator(_checked)]
