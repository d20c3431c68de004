"""Constrained decoding, for answers of a JSON schema and for tool calls: after each token, which ones may follow.

llguidance (https://github.com/guidance-ai/llguidance) compiles a schema to a grammar over the bytes of the vocabulary's tokens, and
gives a mask for each state of it. It reads no address: a `$ref` leads within the schema, or is refused.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch

from app.answer_syntax import Syntax
from app.errors import BadRequest
from app.inference.protocol import GenerateRequest
from worker.data.chat_template import template_of
from worker.inference.answer_grammar import SPACES, grammar_of
from worker.runtime.transfer import sent

SCHEMA, TOOLS = "response_format", "tools"


class Constraint:
    """The state of one answer. `take` each token that was chosen from the `masked` logits. `param` is the field of the request that
    errors name."""

    def __init__(self, matcher: Any, param: str = SCHEMA) -> None:
        self._matcher, self.param = matcher, param

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
            raise _refused(f"any further: {_first_line(self._matcher.get_error())}", self.param)


def of(schema: dict[str, Any] | None, tokenizer: Any, stops: Iterable[int]) -> Constraint | None:
    """The constraint of a new answer; None without a schema. Raises BadRequest for a schema that cannot be compiled."""
    return None if schema is None else _constraint(_grammar(json.dumps(schema)), tokenizer, stops, SCHEMA)


def of_request(request: GenerateRequest, syntax: Syntax | None, tokenizer: Any, stops: Iterable[int]) -> Constraint | None:
    """The constraint of a new answer to a request; None where its tokens are free. Raises BadRequest for a schema that cannot be compiled."""
    text = grammar_of(request, syntax, template_of(tokenizer), tokenizer)
    if text is None:
        return of(request.sampling.json_schema, tokenizer, stops)
    return _constraint(_from_lark(text), tokenizer, stops, SCHEMA if request.sampling.json_schema is not None else TOOLS)


def _constraint(grammar: str, tokenizer: Any, stops: Iterable[int], param: str) -> Constraint:
    from llguidance import LLMatcher

    matcher = LLMatcher(_vocabulary(tokenizer, tuple(sorted(stops)), param), grammar, log_level=0)
    if matcher.is_error():
        raise _refused(f"here: {_first_line(matcher.get_error())}", param)
    return Constraint(matcher, param)


def _refused(why: str, param: str) -> BadRequest:
    what = "The schema" if param == SCHEMA else "The schema of a function's parameters"
    return BadRequest(f"{what} cannot be followed {why}", hint="Remove that keyword, or write the same with others.", param=param)


@functools.lru_cache(maxsize=256)
def _from_lark(text: str) -> str:
    from llguidance import LLMatcher

    return str(LLMatcher.grammar_from_lark(text))


@functools.lru_cache(maxsize=256)
def _grammar(schema: str) -> str:
    from llguidance import LLMatcher

    grammar: str = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": SPACES})
    return grammar


def _vocabulary(tokenizer: Any, stops: tuple[int, ...], param: str) -> Any:
    """The tokens of a tokenizer as llguidance reads them, kept: reading them takes a second. Any of `stops` may end an answer."""
    known = _vocabularies.setdefault(tokenizer, {})
    if stops not in known:
        from llguidance.hf import from_tokenizer

        try:
            known[stops] = from_tokenizer(tokenizer, eos_token=list(stops))
        except ValueError as error:
            raise _refused(f"by this model, whose tokenizer is of another kind ({_first_line(str(error))})", param) from None
    return known[stops]


_vocabularies: WeakKeyDictionary[Any, dict[tuple[int, ...], Any]] = WeakKeyDictionary()


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:300]
