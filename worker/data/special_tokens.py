"""Escapes special tokens in the content of messages, so that text a person typed stays text.

`<|im_end|>` in a row or in a prompt would otherwise end its turn, and what follows could speak in another role. Before a
conversation is rendered, each special token in a message's content is replaced by a placeholder (`veil`); after the text has been
split into pieces, the original is encoded in two parts (`encode`), so that the tokenizer never sees it whole. A conversation
without special tokens is rendered and encoded exactly as it would be without this file.

Texts that are not conversations are not escaped: somebody who asks a model to continue a text may want its special tokens to be
read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

_OPEN, _CLOSE, _FIRST, _MOST = "\ue010", "\ue011", 0xE100, 6000
_PLACE = re.compile(f"{_OPEN}([\ue100-\uf8ff]){_CLOSE}")


def veil(tokenizer: Any, messages: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """The messages with a placeholder for each special token in their contents, and the tokens that were replaced."""
    pattern = _pattern(tokenizer)
    places: dict[str, int] = {}

    def hide(found: re.Match[str]) -> str:
        return f"{_OPEN}{chr(_FIRST + places.setdefault(found[0], len(places)))}{_CLOSE}"

    if pattern is None:
        return list(messages), []
    veiled = [{**m, "content": pattern.sub(hide, m["content"])} if isinstance(m.get("content"), str) else m for m in messages]
    return veiled, list(places)


def unveil(text: str, kept: Sequence[str]) -> str:
    """The text with its placeholders resolved."""
    return _PLACE.sub(lambda found: _behind(found, kept), text) if kept else text


def encode(text: str, kept: Sequence[str], plainly: Callable[[str], list[int]]) -> list[int]:
    """Ids of a piece of a veiled text. `plainly` encodes text without placeholders."""
    if not kept:
        return plainly(text)
    ids: list[int] = []
    at = 0
    for found in _PLACE.finditer(text):
        marker = _behind(found, kept)
        ids += plainly(text[at : found.start()]) + plainly(marker[:1]) + plainly(marker[1:])
        at = found.end()
    return ids + plainly(text[at:])


def _behind(found: re.Match[str], kept: Sequence[str]) -> str:
    place = ord(found[1]) - _FIRST
    return kept[place] if place < len(kept) else found[0]  # a person may type the placeholder's own characters


def _pattern(tokenizer: Any) -> re.Pattern[str] | None:
    """Matches every special token, the longest first where one is a prefix of another. Cached: some models have thousands."""
    size, pattern = _patterns.get(tokenizer, (-1, None))
    if size != len(tokenizer):
        added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        known = sorted((s for s in added | {str(t) for t in tokenizer.all_special_tokens} if len(s) > 1), key=lambda s: (-len(s), s))[
            :_MOST
        ]
        pattern = re.compile("|".join(map(re.escape, known))) if known else None
        _patterns[tokenizer] = (len(tokenizer), pattern)
    return pattern


_patterns: WeakKeyDictionary[Any, tuple[int, re.Pattern[str] | None]] = WeakKeyDictionary()
