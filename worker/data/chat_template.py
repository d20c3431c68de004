"""Renders rows and prompts to text and tokens; the only place that does.

Training and inference both render here, so the prompt a model was trained on is, token for token, the prompt it is given later.
The loss is taken on the answer: the text an assistant turn adds after the generation prompt, up to and including its end-of-turn
token. Text is encoded in pieces that are split where an answer begins and ends, so no token crosses that boundary. Special tokens
inside the content of a message stay text (`worker/data/special_tokens.py`).

    row shape                 model's kind             rendered as
    messages                  any                      the chat template (`app.chat_templates.PLAIN` when the model has none)
    prompt + completion       instruction, dialogue    a user turn and an assistant turn
    prompt + completion       generic                  unchanged, then the end-of-text token
    text                      any                      unchanged, then the end-of-text token; all of it is trained on
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from app import formats
from app.answer_syntax.hermes import with_calls
from app.chat_templates import source
from app.errors import BadData, BadRequest
from worker.data import special_tokens, template_pool
from worker.data.template_pool import RenderedConversation, Span, TemplateInput

if TYPE_CHECKING:
    from app.run_settings import RunSettings, TrainOn

CHAT_KINDS = ("instruction", "dialogue")
MAX_ROW_CHARACTERS = 4 << 20
"""Maximum characters of one conversation of a dataset: a million tokens, more than any max sequence length."""


class RenderedRow(NamedTuple):
    """Token ids of a row and, for each, whether it has a loss. `cut` is true when the row was truncated."""

    ids: list[int]
    trained: list[bool]
    cut: bool = False


def prepare_tokenizer(tokenizer: Any, run: RunSettings | None = None) -> bool:
    """Set up the tokenizer for training: the chat template that `run` chooses, and a padding token. Returns True when the plain
    template was set because there was none.

    Raises BadData for a tokenizer without an end-of-text token, because nothing could teach the model to stop.
    """
    if tokenizer.eos_token is None:
        raise BadData(
            "The model's tokenizer names no end-of-text token, so the model could not learn where an answer ends.",
            hint="Add eos_token to its tokenizer_config.json.",
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if run and run.chat_template != "model":
        special = {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
        tokenizer.chat_template = source(run.chat_template, run.chat_template_jinja, special, bool(_lead(tokenizer)))
    if tokenizer.chat_template:
        return False
    tokenizer.chat_template = _plain_template(tokenizer)
    return True


def prepare_for_answers(tokenizer: Any, run: RunSettings, kind: str) -> bool:
    """The same for rows of answers to a prompt. Those of a generic model are texts, so no plain template is set or saved."""
    if not prepare_tokenizer(tokenizer, run):
        return False
    if kind == "generic":
        tokenizer.chat_template = None
    return kind != "generic"


def render_row(tokenizer: Any, row: dict[str, Any], kind: str, max_length: int, train_on: TrainOn = "assistant") -> RenderedRow:
    """Token ids of a normalized row (shapes in `app/formats`), truncated to `max_length`, and the loss mask, by `train_on`.

    Raises BadData when the row has none of these shapes or the chat template refuses or rewrites it.
    """
    row = as_trained(row)
    asked = chat_of(tokenizer, row, kind)
    written = template_pool.write_many(tokenizer, template_of(tokenizer), [asked.chat])[0] if asked else None
    if isinstance(written, BadData):
        raise written
    return lay_out(tokenizer, row, max_length, written, asked, train_on)


def as_trained(row: dict[str, Any]) -> dict[str, Any]:
    """The row in one of the shapes of the table above, as its format renders it."""
    return formats.of(row).render(row)


class TemplateChat(NamedTuple):
    """A row's conversation for the chat template, with placeholders for the special tokens `kept` in its contents."""

    chat: TemplateInput
    kept: list[str]


def chat_of(tokenizer: Any, row: dict[str, Any], kind: str) -> TemplateChat | None:
    """The conversation that the chat template renders for a row; None for a row without one. Raises BadData."""
    if "text" in row or not ("messages" in row or kind in CHAT_KINDS):
        return None
    messages, tools = [_plain(m) for m in conversation(row)], row.get("tools")
    if (size := characters([messages, tools])) > MAX_ROW_CHARACTERS:
        raise BadData(
            f"The row's conversation has {size:,} characters, and one may have {MAX_ROW_CHARACTERS:,}.", hint="Split the conversation."
        )
    veiled, kept = special_tokens.veil(tokenizer, messages)
    return TemplateChat(TemplateInput(veiled, tools or None), kept)


def lay_out(
    tokenizer: Any,
    row: dict[str, Any],
    max_length: int,
    written: RenderedConversation | None,
    chat: TemplateChat | None,
    train_on: TrainOn = "assistant",
) -> RenderedRow:
    """`render_row` of a row whose conversation has been rendered; `written` and `chat` are None where it has none."""
    if "text" in row:
        ids = _lead(tokenizer) + _encode(tokenizer, row["text"]) + [tokenizer.eos_token_id]
        trained = [True] * len(ids)
    elif written is not None and chat is not None:
        turns = conversation(row)
        _check_calls(turns, written)
        learnt = _trained_spans(written, [turn.get("weight", 1) != 0 for turn in turns], train_on)
        ids, trained = _tokens(tokenizer, written.text, learnt, [edge for span in written.answers.values() for edge in span], chat.kept)
    else:
        asked, said = (message["content"] for message in conversation(row))
        prompt = _lead(tokenizer) + _encode(tokenizer, asked)
        answer = [*_encode(tokenizer, said), tokenizer.eos_token_id]
        ids, trained = prompt + answer, [train_on == "all_turns"] * len(prompt) + [True] * len(answer)
    if trained:
        trained[0] = False  # the first token has no predecessor that could predict it
    return RenderedRow(ids[:max_length], trained[:max_length], len(ids) > max_length)


def _check_calls(turns: Sequence[dict[str, Any]], written: RenderedConversation) -> None:
    """Raises BadData where the template leaves tool calls out of an answer that has a loss: nothing would be learnt in their place."""
    for i, (start, end) in written.answers.items():
        for call in (turns[i].get("tool_calls") or ()) if turns[i].get("weight", 1) != 0 else ():
            name = (call.get("function") or call).get("name")
            if isinstance(name, str) and name not in written.text[start:end]:
                raise BadData(
                    f"The chat template leaves the tool call {name!r} of turn {i + 1} out.",
                    hint="Choose the chat template hermes, or a model whose own template writes tool calls.",
                )


def _trained_spans(written: RenderedConversation, weighed: Sequence[bool], train_on: TrainOn) -> list[Span]:
    """The spans of a rendered conversation that have a loss; `weighed` says for each turn whether it may."""
    answers = [span for i, span in sorted(written.answers.items()) if weighed[i]]
    if train_on != "all_turns":
        return answers[-1:] if train_on == "last_turn" else answers
    masked = [span for i, span in sorted(written.answers.items()) if not weighed[i]]
    starts, ends = [0, *(span.end for span in masked)], [*(span.start for span in masked), len(written.text)]
    return [Span(start, end) for start, end in zip(starts, ends, strict=True) if start < end]


def render_prompt(
    tokenizer: Any,
    kind: str,
    prompt: str | Sequence[dict[str, Any]],
    tools: list[Any] | None = None,
    most: int = template_pool.MAX_WRITTEN,
    seconds: float = template_pool.PATIENT_SECONDS,
    options: dict[str, bool | str] | None = None,
) -> tuple[str, list[int]]:
    """The exact text and ids that a model continues: a conversation through the chat template, or a text unchanged. `options` are
    further variables of the template.

    `kind` is the model's; a generic model gets a conversation in the plain template. Raises BadRequest when the template refuses
    the conversation (wrong order of roles, for example), BadTemplate when it had to be stopped, and TooLong for more than `most`
    characters, which are neither rendered nor encoded.
    """
    if (size := characters([prompt, tools])) > most:
        raise template_pool.TooLong(size)
    if isinstance(prompt, str):
        return prompt, _lead(tokenizer) + _encode(tokenizer, prompt)
    messages, kept = special_tokens.veil(tokenizer, [_plain(m) for m in prompt])
    try:
        # A placeholder is three characters long, and a special token at least two.
        chat = TemplateInput(messages, tools or None, generate=True, options=options or {})
        text, answers = template_pool.write(tokenizer, template_of(tokenizer), chat, 2 * most, seconds)
    except template_pool.TemplateFailed as error:
        raise BadRequest(error.message, hint=error.hint, param="messages") from None
    if len(shown := special_tokens.unveil(text, kept)) > most:
        raise template_pool.TooLong(len(shown))
    return shown, _tokens(tokenizer, text, [], [edge for span in answers.values() for edge in span], kept)[0]


def ids_behind_answer(tokenizer: Any, messages: Sequence[dict[str, Any]], tools: list[Any] | None) -> list[int]:
    """The ids between the end of a conversation's last answer, as the model writes it, and its next one: results of tools, and the prompt to go
    on. Raises BadData where the template does not show where that answer ends."""
    veiled, kept = special_tokens.veil(tokenizer, [_plain(m) for m in messages])
    chat = TemplateInput(veiled, tools or None, generate=True)
    text, answers = template_pool.write(tokenizer, template_of(tokenizer), chat, seconds=template_pool.PATIENT_SECONDS)
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    if last not in answers:
        raise BadData(
            "The chat template does not show where an answer with tool calls ends, so it cannot go on from their results.",
            hint="Choose the chat template hermes.",
        )
    return special_tokens.encode(text[answers[last].end :], kept, lambda part: _encode(tokenizer, part))


def characters(value: Any) -> int:
    """Characters of all strings in a JSON value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(characters, value)) + sum(map(characters, value.values()))
    return sum(map(characters, value)) if isinstance(value, list | tuple) else 0


def conversation(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of a row; a prompt and its completion become a user turn and an assistant turn."""
    if "messages" in row:
        if not isinstance(row["messages"], list) or not all(isinstance(m, dict) and "role" in m for m in row["messages"]):
            raise BadData("The row's messages are not a list of objects with a role.", hint="Fix the row.")
        return row["messages"]
    if "prompt" not in row or "completion" not in row:
        raise BadData(
            f"The row has the keys {', '.join(sorted(row))}, none of which a text model trains on.",
            hint="Use rows with messages, with prompt and completion, or with text.",
        )
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]


def sample_of(row: dict[str, Any], kind: str) -> tuple[str | list[dict[str, Any]], str]:
    """What to ask and what a person wrote: the last answer of a held-out row, and all that stands before it."""
    row = as_trained(row)
    if "text" in row:
        cut = max(1, min(len(row["text"]) // 3, 300))
        return row["text"][:cut], row["text"][cut:]
    if "messages" not in row and kind not in CHAT_KINDS:
        return row["prompt"], row["completion"]
    messages = conversation(row)
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=len(messages))
    if last == len(messages):
        return messages, ""
    answer = messages[last]
    calls = answer.get("tool_calls")
    return messages[:last], with_calls(answer.get("content") or "", calls) if calls else answer.get("content") or ""


def stop_ids(tokenizer: Any, generation_config: Any = None) -> list[int]:
    """All tokens that end an answer: the tokenizer's, the model's own, and the one with which its chat template closes a turn."""
    found = {tokenizer.eos_token_id}
    named = getattr(generation_config, "eos_token_id", None)
    found.update(named if isinstance(named, (list, tuple)) else [named])
    found.add(closing_id(tokenizer))
    return sorted(i for i in found if i is not None)


def closing_id(tokenizer: Any) -> int | None:
    """The token with which the chat template closes an answer; None without a template, and where it is not a single token."""
    if not tokenizer.chat_template:
        return None
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        ids, trained, _ = render_row(tokenizer, {"messages": turn}, "dialogue", 1 << 30)
    except BadData:
        return None
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    last = [i for i, learnt in zip(ids, trained, strict=True) if learnt][-1:]
    return last[0] if last and last[0] in special else None


def template_remark(tokenizer: Any, run: RunSettings) -> str | None:
    """A remark for the person who chose the template; None for the model's own."""
    if run.chat_template == "model":
        return None
    closing = closing_id(tokenizer)
    if closing is None:
        return (
            "The chat template ends an answer with no token of this model's own, so nothing teaches the model to stop. End the turns of the "
            "assistant with {{ eos_token }}."
        )
    named = "as the job says it" if run.chat_template == "jinja" else run.chat_template
    return f"The chat template is {named}; an answer ends with {tokenizer.decode([closing])}. It is saved with the result."


# Text and tokens ------------------------------------------------------------------------------------------------------


def _tokens(tokenizer: Any, text: str, learnt: list[Span], cuts: list[int], kept: Sequence[str] = ()) -> tuple[list[int], list[bool]]:
    """Ids of `text`, encoded piece by piece between the cuts, and the loss mask of the pieces inside a span of `learnt`. `kept`
    are the special tokens of the contents, which are encoded as text."""
    ids: list[int] = []
    trained: list[bool] = []
    edges = sorted({0, len(text), *cuts})
    ends = {span.start: span.end for span in learnt}  # no two of them overlap, and each begins at a cut
    until = 0
    for start, end in itertools.pairwise(edges):
        piece = special_tokens.encode(text[start:end], kept, lambda part: _encode(tokenizer, part))
        ids += piece
        until = max(until, ends.get(start, 0))
        trained += [end <= until] * len(piece)
    return ids, trained


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []


def _lead(tokenizer: Any) -> list[int]:
    """The tokens this tokenizer puts before every text (a begin-of-text token, or none)."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def template_of(tokenizer: Any) -> str:
    """The source of the template that renders a model's conversations."""
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several by name
        template = template.get("default")
    return template or _plain_template(tokenizer)


def _plain_template(tokenizer: Any) -> str:
    """The template of a model without one."""
    return str(source("plain", None, (), bool(_lead(tokenizer))))


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """A message as templates expect it: without our `weight`, with text parts joined, and with the arguments of tool calls as objects,
    which the API and rows in its shape have as JSON text."""
    kept = {k: v for k, v in message.items() if k != "weight" and v is not None}
    if isinstance(kept.get("tool_calls"), list):
        kept["tool_calls"] = [_with_object(call) for call in kept["tool_calls"]]
    if isinstance(kept.get("content"), list):
        kept["content"] = "".join(part.get("text", "") for part in kept["content"])
    kept.setdefault("content", "")
    return kept


def _with_object(call: Any) -> Any:
    """A tool call with its arguments as an object; unchanged where they are no JSON of one."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return call | {"function": function | {"arguments": arguments}} if isinstance(arguments, dict) else call
