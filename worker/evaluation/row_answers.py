"""Answers to many rows by one model, several at a time, in the process that has the engine: what runs of prompts and of distillation share."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple, TypeVar

from app.errors import StudioError
from app.inference.judges import Hear
from app.inference.protocol import AnswerStarted, ChoiceFinished, Done, GenerateRequest, TextPart
from app.kit.token_meter import TokenMeter

Row = TypeVar("Row")
Result = TypeVar("Result")
AT_ONCE = 8
BEAT_SECONDS = 2.0


class RowAnswer(NamedTuple):
    """The engine's answer to one row."""

    prompt: str
    texts: list[str]
    prompt_tokens: int
    tokens: int
    cut: list[bool]  # whether the limit ended each text


class RunStopped(Exception):
    """The run was cancelled, deleted or taken over."""


class RunTotals:
    """Totals over the scored rows, from all workers that had the run, and the rows without an answer.

    A failed request says nothing about the prompt, so its row is excluded from the score and counted. An error of the row itself
    (too long for the model, refused by its template) affects that row only; other errors end the run when they occur in
    succession.
    """

    def __init__(self, before: dict[str, Any]) -> None:
        self.prompt_tokens, self.tokens = before.get("prompt_tokens", 0), before.get("tokens", 0)
        self.seconds, self.began = before.get("seconds", 0.0), time.monotonic()
        self.unanswered: list[int] = []
        self.first_fault: StudioError | None = None
        self.strikes = 0

    def answered(self, said: RowAnswer) -> None:
        self.prompt_tokens += said.prompt_tokens
        self.tokens += said.tokens
        self.strikes = 0

    def failed(self, line: int, fault: StudioError) -> None:
        """Exclude a row; raises the error when it is not that row's own."""
        self.unanswered.append(line)
        self.first_fault = self.first_fault or fault
        self.strikes += fault.status != 400
        if self.strikes >= AT_ONCE:
            raise fault

    def as_json(self, rows: int) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens, "tokens": self.tokens, "seconds": self.seconds + time.monotonic() - self.began,
            "unanswered": len(self.unanswered), "unanswered_lines": sorted(self.unanswered)[:20], "asked_of": rows,
        }  # fmt: skip


# Row by row -----------------------------------------------------------------------------------------------------------


def each_row(
    rest: Iterator[Row],
    work: Callable[[Row, list[bool]], Result],
    take: Callable[[Row, Future[Result]], None],
    store: Callable[[], None],
    going_down: Callable[[], bool],
) -> None:
    """Do `work` on every row in threads, `take` what comes of each, and `store` all of it every few seconds and at the end. `work` is given
    a list whose only item becomes true when it must leave. Raises RunStopped, and what `take` and `store` raise."""
    beaten, leave = time.monotonic(), [False]
    pending: dict[Future[Result], Row] = {}
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="rows") as pool:
        try:
            while True:
                for row in _some(rest, AT_ONCE - len(pending)):
                    pending[pool.submit(work, row, leave)] = row
                if not pending:
                    break
                finished, _ = wait(pending, timeout=BEAT_SECONDS, return_when=FIRST_COMPLETED)
                for future in finished:
                    take(pending.pop(future), future)
                if going_down():
                    raise RunStopped  # stored rows are not repeated by whoever takes over the run
                if time.monotonic() - beaten > BEAT_SECONDS:
                    beaten = time.monotonic()
                    store()
        finally:
            leave[0] = True
            store()


def _some(rows: Iterator[Row], count: int) -> Iterator[Row]:
    for _ in range(count):
        row = next(rows, None)
        if row is None:
            return
        yield row


def answered(request: GenerateRequest, count: int, leave: list[bool], meter: TokenMeter) -> RowAnswer:
    """The `count` answers to one request. Raises what the engine raises; a cancelled answer is discarded, but its tokens count."""
    from worker.inference.task import answer as answer_of

    texts, rendered, tokens, read, cut = [""] * count, "", [0] * count, 0, [False] * count
    try:
        with contextlib.closing(answer_of(request)) as answer:
            for entries in answer:
                if leave[0]:
                    raise RunStopped
                for entry in entries:
                    match entry:
                        case AnswerStarted():
                            rendered, read = entry.rendered_prompt, entry.prompt_tokens
                        case TextPart():
                            texts[entry.index] += entry.text
                            tokens[entry.index] = entry.tokens
                        case ChoiceFinished():
                            tokens[entry.index], cut[entry.index] = entry.tokens, entry.reason != "stop"
                        case Done():
                            pass
                        case _:
                            raise _fault(entry)
    finally:
        meter.add(read, sum(tokens))
    return RowAnswer(rendered, texts, read, sum(tokens), cut)


def _fault(entry: Any) -> StudioError:
    """The engine's error entry as an exception with its status."""
    fault = StudioError(getattr(entry, "message", "The model failed."), hint=getattr(entry, "hint", ""), code=getattr(entry, "code", None))
    fault.status = getattr(entry, "status", 500)
    return fault


def send_here(request: GenerateRequest, hear: Hear) -> None:
    """What a grader asks a model, answered by this process."""
    from worker.inference.embeddings import embed
    from worker.inference.reward import reward
    from worker.inference.task import answer as answer_of

    if request.embed is not None:
        return hear([embed(request.model, request.embed)])
    if request.reward is not None:
        return hear([reward(request.model, request.reward)])
    with contextlib.closing(answer_of(request)) as answer:
        for entries in answer:
            hear(entries)
