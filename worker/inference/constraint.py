"""Constrained decoding, for answers of a JSON schema: after each token, which ones may follow.

llguidance (https://github.com/guidance-ai/llguidance) compiles the schema to a grammar over the bytes of the vocabulary's tokens, and
gives a mask for each state of it. It reads no address: a `$ref` leads within the schema, or is refused.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch

from app.errors import BadRequest
from worker.runtime.transfer import sent

SPACES = r"[ \n]{0,24}"
"""White space between the parts of an answer: enough to indent, and not so much that a small model writes nothing else."""


class Constraint:
    """The state of one answer. `take` each token that was chosen from the `masked` logits."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def masked(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (V,) with -inf for tokens that may not follow; the given ones are not changed."""
        bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        self._raise_if_broken()
        allowed = (bits[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).bool().view(-1)
        size = len(logits)
        allowed = allowed[:size] if len(allowed) >= size else torch.cat([allowed, allowed.new_zeros(size - len(allowed))])
        return torch.where(sent(allowed, logits.device), logits, float("-inf"))

    def take(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._raise_if_broken()

    def is_complete(self) -> bool:
        """Whether the answer is whole and nothing can be added to it."""
        return bool(self._matcher.is_stopped())

    def _raise_if_broken(self) -> None:
        if self._matcher.is_error():
            raise _refused(f"any further: {_first_line(self._matcher.get_error())}")


def of(schema: dict[str, Any] | None, tokenizer: Any, stops: Iterable[int]) -> Constraint | None:
    """The constraint of a new answer; None without a schema. Raises BadRequest for a schema that cannot be compiled."""
    if schema is None:
        return None
    from llguidance import LLMatcher

    matcher = LLMatcher(_vocabulary(tokenizer, tuple(sorted(stops))), _grammar(json.dumps(schema)), log_level=0)
    if matcher.is_error():
        raise _refused(f"here: {_first_line(matcher.get_error())}")
    return Constraint(matcher)


def _refused(why: str) -> BadRequest:
    return BadRequest(
        f"The schema cannot be followed {why}", hint="Remove that keyword, or write the same with others.", param="response_format"
    )


@functools.lru_cache(maxsize=256)
def _grammar(schema: str) -> str:
    from llguidance import LLMatcher

    grammar: str = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": SPACES})
    return grammar


def _vocabulary(tokenizer: Any, stops: tuple[int, ...]) -> Any:
    """The tokens of a tokenizer as llguidance reads them, kept: reading them takes a second. Any of `stops` may end an answer."""
    known = _vocabularies.setdefault(tokenizer, {})
    if stops not in known:
        from llguidance.hf import from_tokenizer

        try:
            known[stops] = from_tokenizer(tokenizer, eos_token=list(stops))
        except ValueError as error:
            raise _refused(f"by this model, whose tokenizer is of another kind ({_first_line(str(error))})") from None
    return known[stops]


_vocabularies: WeakKeyDictionary[Any, dict[tuple[int, ...], Any]] = WeakKeyDictionary()


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:300]
