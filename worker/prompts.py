"""The one place where rows and prompts become text and tokens.

Training and the playground both render here, so the prompt a model was trained on is, token for token, the prompt it is
given later. What learns is the answer: the text an assistant turn adds after the generation prompt, up to and including
its end-of-turn token. The text is cut where an answer begins and ends, so no token straddles that line. A template's own
markers in what a person typed stay text (`worker/markers.py`).

    row shape                 model's kind             rendered as
    messages                  any                      the chat template (`PLAIN_TEMPLATE` when the model has none)
    prompt + completion       instruction, dialogue    a user turn and an assistant turn
    prompt + completion       generic                  as they stand, then the end-of-text token
    text                      any                      as it stands, then the end-of-text token; all of it is learnt
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError

from app.errors import BadData, BadRequest
from worker import markers

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'] | capitalize + ':\\n' + message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)
"""The template a generic model learns when it is given conversations or instructions. It is saved with the result."""

CHAT_KINDS = ("instruction", "dialogue")
_FIXABLE = (TemplateError, TypeError, KeyError, IndexError, AttributeError, ValueError, ArithmeticError)


class Rendered(NamedTuple):
    """A row as token ids and, for each, whether its prediction is learnt. `cut` says that it was longer than allowed."""

    ids: list[int]
    trained: list[bool]
    cut: bool = False


class Span(NamedTuple):
    """A stretch of the rendered text, in characters, that is learnt."""

    start: int
    end: int


def prepare_tokenizer(tokenizer: Any) -> bool:
    """Give the tokenizer what training needs: a chat template and a padding token. True when the plain template was set.

    Raises BadData for a tokenizer without an end-of-text token: nothing could teach the model to stop.
    """
    if tokenizer.eos_token is None:
        raise BadData(
            "The model's tokenizer names no end-of-text token, so the model could not learn where an answer ends.",
            way_out="Add eos_token to its tokenizer_config.json.",
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template:
        return False
    tokenizer.chat_template = PLAIN_TEMPLATE
    return True


def tuned_kind(kind: str, format_: str) -> str:
    """The kind of a model of `kind` after it has learnt rows of a dataset format."""
    if format_ == "chat":
        return "dialogue"
    if format_ == "instruction" and kind == "generic":
        return "instruction"
    return kind


def render_row(tokenizer: Any, row: dict[str, Any], kind: str, max_length: int) -> Rendered:
    """Token ids of a normalised row (shapes in `app/formats`), cut to `max_length`, and the mask of what is learnt.

    Raises BadData when the row has no such shape or the chat template refuses or rewrites it.
    """
    if "text" in row:
        ids = _lead(tokenizer) + _encode(tokenizer, row["text"]) + [tokenizer.eos_token_id]
        trained = [True] * len(ids)
    elif "messages" in row or kind in CHAT_KINDS:
        ids, trained = _render_chat(tokenizer, conversation(row), row.get("tools"))
    else:
        asked, said = (message["content"] for message in conversation(row))
        prompt = _lead(tokenizer) + _encode(tokenizer, asked)
        answer = [*_encode(tokenizer, said), tokenizer.eos_token_id]
        ids, trained = prompt + answer, [False] * len(prompt) + [True] * len(answer)
    if trained:
        trained[0] = False  # nothing stands before the first token, so nothing predicts it
    return Rendered(ids[:max_length], trained[:max_length], len(ids) > max_length)


def render_prompt(
    tokenizer: Any, kind: str, prompt: str | Sequence[dict[str, Any]], tools: list[Any] | None = None
) -> tuple[str, list[int]]:
    """The exact text and ids a model continues: a conversation through the chat template, or a text as it stands.

    `kind` is the model's; a generic model is given a conversation in the plain template. Raises BadRequest when the
    template refuses the conversation (roles out of order, for one).
    """
    if isinstance(prompt, str):
        return prompt, _lead(tokenizer) + _encode(tokenizer, prompt)
    messages, kept = markers.veil(tokenizer, [_plain(m) for m in prompt])
    try:
        text = _template(tokenizer, messages, tools, generate=True)
    except _FIXABLE as error:
        raise BadRequest(
            f"The model's chat template refuses this conversation: {error}",
            way_out="Check the order of the roles; some models take no system message.",
            param="messages",
        ) from None
    cuts = _prompt_cuts(tokenizer, messages, tools, text)
    return markers.unveil(text, kept), _tokens(tokenizer, text, [], cuts, kept)[0]


def conversation(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of a row; a prompt and its completion become a user turn and an assistant turn."""
    if "messages" in row:
        if not isinstance(row["messages"], list) or not all(isinstance(m, dict) and "role" in m for m in row["messages"]):
            raise BadData("The row's messages are not a list of objects with a role.", way_out="Mend the row.")
        return row["messages"]
    if "prompt" not in row or "completion" not in row:
        raise BadData(
            f"The row has the keys {', '.join(sorted(row))}, none of which a text model learns from.",
            way_out="Use rows with messages, with prompt and completion, or with text.",
        )
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]


def sample_of(row: dict[str, Any], kind: str) -> tuple[str | list[dict[str, Any]], str]:
    """What to ask and what a person wrote: the last answer of a held-out row, and all that stands before it."""
    if "text" in row:
        cut = max(1, min(len(row["text"]) // 3, 300))
        return row["text"][:cut], row["text"][cut:]
    if "messages" not in row and kind not in CHAT_KINDS:
        return row["prompt"], row["completion"]
    messages = conversation(row)
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=len(messages))
    reference = messages[last].get("content") or "" if last < len(messages) else ""
    return messages[:last], reference


def stop_ids(tokenizer: Any, generation_config: Any = None) -> list[int]:
    """Every token that ends an answer: the tokenizer's, the model's own, and the one its chat template closes a turn with."""
    found = {tokenizer.eos_token_id}
    named = getattr(generation_config, "eos_token_id", None)
    found.update(named if isinstance(named, (list, tuple)) else [named])
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            ids, trained = _render_chat(tokenizer, turn, None)
        except BadData:
            ids, trained = [], []
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        last = [i for i, learnt in zip(ids, trained, strict=True) if learnt]
        found.update(last[-1:] if last and last[-1] in special else [])
    return sorted(i for i in found if i is not None)


# Conversations --------------------------------------------------------------------------------------------------------


def _render_chat(tokenizer: Any, messages: list[dict[str, Any]], tools: list[Any] | None) -> tuple[list[int], list[bool]]:
    plain, kept = markers.veil(tokenizer, [_plain(m) for m in messages])
    try:
        text = _template(tokenizer, plain, tools)
    except _FIXABLE as error:
        raise BadData(
            f"The model's chat template refuses this conversation: {error}",
            way_out="Check the order of the roles; some models take no system message.",
        ) from None
    spans = {i: _answer(tokenizer, plain, tools, text, i) for i, m in enumerate(plain) if m["role"] == "assistant"}
    learnt = [spans[i] for i in spans if messages[i].get("weight", 1) != 0]
    return _tokens(tokenizer, text, learnt, [edge for span in spans.values() for edge in span], kept)


def _answer(tokenizer: Any, messages: list[dict[str, Any]], tools: list[Any] | None, text: str, i: int) -> Span:
    """Where the assistant's turn `i` stands in the rendered `text`.

    First by prefixes: what the template adds to `messages[:i]` and its generation prompt when it is given the turn. A
    template that writes earlier turns differently (dropping old reasoning, for one) fails that test; then a marker put in
    the place of the turn's content shows where the content lies. If neither holds the turn cannot be found.
    """
    before = _try_template(tokenizer, messages[:i], tools, generate=True)
    through = text if i == len(messages) - 1 else _try_template(tokenizer, messages[: i + 1], tools)
    opens = before is not None and text.startswith(before)
    if opens and through is not None and text.startswith(through) and len(through) > len(before):
        return Span(len(before), _close(tokenizer, text, len(before), len(through)))
    content = messages[i].get("content") or ""
    found = _by_marker(tokenizer, messages, tools, text, i) if content.strip() else None
    if found is None:
        raise BadData(
            f"The model's chat template rewrites turn {i + 1} of this conversation, so the answer to learn cannot be found in it.",
            way_out="Split the conversation so that this answer comes last, or use another model.",
        )
    start = len(before) if opens and len(before) <= found.start else found.start
    return Span(start, _turn_end(tokenizer, text, found.end))


def _by_marker(tokenizer: Any, messages: list[dict[str, Any]], tools: list[Any] | None, text: str, i: int) -> Span | None:
    """The span of a turn's content: what stands between the unchanged text before and after a marker in its place."""
    marker = "\ue000luthier\ue001"
    marked = _try_template(tokenizer, [*messages[:i], {**messages[i], "content": marker}, *messages[i + 1 :]], tools)
    if marked is None or marked.count(marker) != 1:
        return None
    head, tail = marked.split(marker)
    end = len(text) - len(tail)
    if not (text.startswith(head) and text.endswith(tail) and len(head) < end):
        return None
    inside = text[len(head) : end].strip()
    return Span(len(head), end) if inside and inside in messages[i]["content"] else None


def _close(tokenizer: Any, text: str, start: int, end: int) -> int:
    """`end` without the blanks a template writes after the end-of-turn token: the model stops there, so it never writes them."""
    bare = start + len(text[start:end].rstrip())
    special = [str(t) for t in tokenizer.added_tokens_decoder.values()] + list(tokenizer.all_special_tokens)
    return bare if any(text[start:bare].endswith(token) for token in special if token) else end


def _turn_end(tokenizer: Any, text: str, end: int) -> int:
    """The end of the special token that closes the turn right after its content, or `end` when there is none."""
    rest = text[end:]
    blanks = len(rest) - len(rest.lstrip())
    special = {str(t) for t in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    closing = [t for t in special if t and rest[blanks:].startswith(t)]
    return end + blanks + max(map(len, closing)) if closing else end


def _prompt_cuts(tokenizer: Any, messages: list[dict[str, Any]], tools: list[Any] | None, text: str) -> list[int]:
    """The places where training cuts the same text: around each earlier answer, and at the end."""
    cuts: list[int] = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            try:
                cuts += _answer(tokenizer, messages, tools, text, i)
            except BadData:
                return []
    return cuts


# Text and tokens ------------------------------------------------------------------------------------------------------


def _tokens(tokenizer: Any, text: str, learnt: list[Span], cuts: list[int], kept: Sequence[str] = ()) -> tuple[list[int], list[bool]]:
    """Ids of `text`, encoded piece by piece between the cuts, and the mask of the pieces that lie in a learnt span. `kept`
    are the special tokens of the contents, which are encoded as text."""
    ids: list[int] = []
    trained: list[bool] = []
    edges = sorted({0, len(text), *cuts})
    for start, end in itertools.pairwise(edges):
        piece = markers.encode(text[start:end], kept, lambda part: _encode(tokenizer, part))
        ids += piece
        trained += [any(s.start <= start and end <= s.end for s in learnt)] * len(piece)
    return ids, trained


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []


def _lead(tokenizer: Any) -> list[int]:
    """The tokens this tokenizer puts before every text (a begin-of-text token, or none)."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def _template(tokenizer: Any, messages: list[dict[str, Any]], tools: list[Any] | None, *, generate: bool = False) -> str:
    template = tokenizer.chat_template or PLAIN_TEMPLATE
    return tokenizer.apply_chat_template(
        messages, tools=tools or None, chat_template=template, add_generation_prompt=generate, tokenize=False
    )


def _try_template(tokenizer: Any, messages: list[dict[str, Any]], tools: list[Any] | None, *, generate: bool = False) -> str | None:
    try:
        return _template(tokenizer, messages, tools, generate=generate)
    except _FIXABLE:
        return None


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """A message as templates know it: without our `weight`, and text parts joined."""
    kept = {k: v for k, v in message.items() if k != "weight" and v is not None}
    if isinstance(kept.get("content"), list):
        kept["content"] = "".join(part.get("text", "") for part in kept["content"])
    kept.setdefault("content", "")
    return kept
