"""From logits to entries: the next token of a sequence is chosen, its text is emitted, and the sequence ends when it is complete."""

from __future__ import annotations

import time

from app.inference.protocol import ChoiceFinished, Done, Entry, TextPart
from worker.inference.errors import NotANumber
from worker.inference.next_token import Options
from worker.inference.scheduler import Request, TokenSequence


def choose(r: Request, row: TokenSequence, options: Options, entries: list[Entry]) -> None:
    """Choose the next token of a sequence and accept it. Raises NotANumber where its logits are not finite."""
    if options.likeliest is None:
        raise NotANumber(
            f"{r.request.model.name} computed numbers that are none (NaN), so there is no next token.",
            hint="Its weights are likely to be broken, as when training diverged: take an earlier checkpoint.",
        )
    token = options.likeliest if r.is_greedy else options.sampled(row.chooser)
    if r.top_logprobs is not None:
        row.logprobs.append(options.logprob(r.place.tokenizer, token, r.top_logprobs))
        row.begins.append(row.offsets.place(row.logprobs[-1].bytes))
    _accept(r, row, token, entries)


def _accept(running: Request, row: TokenSequence, token: int, entries: list[Entry]) -> None:
    """Append a token to a sequence: emit the text that may be shown, and end it when it is complete."""
    running.first_token = running.first_token or time.monotonic()
    row.written.append(token)
    if token in running.place.stop_ids:
        if row.logprobs:
            row.logprobs.pop(), row.begins.pop()  # the token that ends an answer is not part of it
        return finish(running, row, "stop", entries)
    text = row.text.push(token)
    if row.text.stopped:
        _show(row, text, entries)
        row.logprobs.clear()  # what remains are tokens of the stop string
        return finish(running, row, "stop", entries)
    if text:
        _show(row, text, entries)
    if row.chooser.constraint is not None and row.chooser.constraint.is_complete():
        finish(running, row, "stop", entries)  # nothing but its end may follow
    elif len(row.written) >= running.max_tokens:
        finish(running, row, "length", entries)
    return None


def _show(row: TokenSequence, text: str, entries: list[Entry], *, all_of_it: bool = False) -> None:
    """Emit a text and the tokens that begin in the text emitted so far; the others wait for theirs, or for the end."""
    begun = len(row.logprobs) if all_of_it else sum(begin < row.text.shown for begin in row.begins)
    if text or begun:
        entries.append(TextPart(index=row.index, text=text, tokens=len(row.written), logprobs=row.logprobs[:begun]))
        row.logprobs, row.begins = row.logprobs[begun:], row.begins[begun:]


def finish(running: Request, row: TokenSequence, reason: str, entries: list[Entry]) -> None:
    """End a sequence: emit the rest of its text and release its slot."""
    _show(row, row.text.end(), entries, all_of_it=True)
    row.finished = True
    running.free(row)
    entries.append(ChoiceFinished(index=row.index, reason=reason, tokens=len(row.written)))


def done(running: Request) -> Done:
    """The last entry of a request: its tokens and its speed."""
    now, written = time.monotonic(), running.written
    first, speed = running.first_token, None
    if first is not None and written > len(running.rows):
        speed = (written - len(running.rows)) / max(now - first, 1e-9)
    return Done(
        prompt_tokens=len(running.prompt) - running.place.lane.lead,
        cached_tokens=running.cached,
        completion_tokens=written,
        first_token_seconds=None if first is None else first - running.began,
        tokens_per_second=speed,
    )
