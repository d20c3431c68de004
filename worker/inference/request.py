"""Renders a request to the tokens a model reads, by the same code as training, and computes the room left for the answer."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from app.errors import BadRequest
from app.inference.protocol import GenerateRequest, RenderedPrompt
from app.settings import get_settings
from worker.data import answer_form, chat_template
from worker.data.template_pool import SECONDS, TooLong
from worker.inference import answer_plan
from worker.inference.model_pool import ModelPool


def render(request: GenerateRequest, tokenizer: Any, context: int) -> tuple[str, list[int]]:
    """Text and token ids of the prompt. Raises BadRequest for an empty prompt, and for one that cannot fit into `context` tokens;
    a text too long for any tokenization is refused before it is encoded."""
    kind = request.model.kind
    if request.tokens is not None:
        room_for(request, len(request.tokens), context)
        size = max(request.model.shape.vocabulary, len(tokenizer))  # an adapter may have tokens that its base has not
        wrong = next((t for t in request.tokens if not 0 <= t < size), None)
        if wrong is not None:
            raise BadRequest(f"There is no token {wrong}: the vocabulary has {size}.", hint="Send text instead.", param="prompt")
        ids = list(request.tokens)
        text = tokenizer.decode(ids, skip_special_tokens=False)
    else:
        most = context * longest_token(tokenizer)
        try:
            text, ids = _write(request, tokenizer, kind, most)
        except TooLong as error:
            raise _too_long(request, f"{error.characters:,} characters, more than {context:,} tokens can hold", context) from None
    if not ids:
        raise BadRequest("The prompt is empty.", hint="Write at least one character.", param="prompt")
    return text, ids


def _write(request: GenerateRequest, tokenizer: Any, kind: str, most: int) -> tuple[str, list[int]]:
    if request.messages is None:
        if request.model.shape.encodes:
            raise BadRequest(
                f"{request.model.name} is an encoder–decoder: it answers a prompt and continues no text.",
                hint="Send messages.",
                param="prompt",
            )
        return chat_template.render_prompt(tokenizer, kind, request.prompt or "", None, most, SECONDS)
    answer_plan.check_tools(request, tokenizer)
    messages, options = answer_plan.messages_of(request, tokenizer), answer_plan.options_of(request, tokenizer)
    return chat_template.render_prompt(tokenizer, kind, messages, request.tools, most, SECONDS, options)


def rendered(request: GenerateRequest, shelf: ModelPool) -> RenderedPrompt:
    """The rendered prompt of a request that an external server answers; no weights are loaded for it. Raises BadRequest."""
    ref = request.model
    tokenizer, stops = shelf.tokenizer(ref)
    context = min(ref.shape.positions, get_settings().generate_context)
    text, ids = render(request, tokenizer, context)
    room = room_for(request, len(ids), context)
    syntax = answer_plan.syntax_of(request, tokenizer, text)
    return RenderedPrompt(
        text=text, tokens=ids, stop_tokens=sorted(stops), max_tokens=room, context=context,
        syntax=syntax, special=bool(answer_form.special_markers(tokenizer, syntax)),
    )  # fmt: skip


def room_for(request: GenerateRequest, size: int, context: int) -> int:
    """Tokens left for the answer. Raises BadRequest when there are none."""
    if context - size >= 1:
        return context - size
    raise _too_long(request, f"{size} tokens", context)


def longest_token(tokenizer: Any) -> int:
    """Characters of the longest token. For a byte-level vocabulary bytes are counted, which are no fewer."""
    if tokenizer not in _longest:
        _longest[tokenizer] = max(map(len, tokenizer.get_vocab()))
    return _longest[tokenizer]


_longest: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


def _too_long(request: GenerateRequest, size: str, context: int) -> BadRequest:
    return BadRequest(
        f"The prompt has {size}, and {request.model.name} reads at most {context}, its answer included.",
        hint="Shorten the prompt, or remove earlier turns.",
        param="messages" if request.messages is not None else "prompt",
        code="context_length_exceeded",
    )
