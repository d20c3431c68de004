"""The body of the task PROMPT: put one prompt to one model, row by row, through this process's engine.

Several rows are asked at once, so the engine answers them in one batch, together with whoever chats meanwhile: its queue
is fair by owner. Every few seconds the scored rows are stored; a stopped or deleted run ends there.
"""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

from app import prompt_runs, prompts
from app.db import transaction
from app.errors import StudioError
from app.generation import ChoiceFinished, Done, GenerateRequest, Sampling, Started, TextPart
from app.prompt_runs import RunSpec

log = logging.getLogger(__name__)

AT_ONCE = 8
BEAT_SECONDS = 2.0


class Said(NamedTuple):
    """What the engine answered to one row."""

    prompt: str
    texts: list[str]
    prompt_tokens: int
    tokens: int


class Stopped(Exception):
    """The run was cancelled, deleted or taken over."""


def work(run_id: uuid.UUID) -> None:
    """Run it, unless another worker is at it. Every fault becomes the run's error."""
    with transaction() as session:
        claimed = prompt_runs.claim(session, run_id)
    if claimed is None:
        return
    fence, spec, done = claimed
    began, totals, error = time.monotonic(), {"prompt_tokens": 0, "tokens": 0, "unanswered": 0}, None
    try:
        _run(run_id, fence, spec, done, totals)
    except Stopped:
        return
    except StudioError as fault:
        error = {"code": fault.code, "message": fault.message, "way_out": fault.way_out}
    except Exception as fault:
        log.exception("The run %s failed.", run_id)
        error = {"code": "internal_error", "message": f"The run failed ({type(fault).__name__}).", "way_out": "Try it again."}
    with transaction() as session:
        prompt_runs.finish(session, run_id, fence, more={**totals, "seconds": time.monotonic() - began}, error=error)


def _run(run_id: uuid.UUID, fence: int, spec: RunSpec, done: set[int], totals: dict[str, int]) -> None:
    from worker.shots import Shots

    held, training, everything, labels = _rows(spec)
    shots = Shots(spec.body, training, everything)
    left = [row for row in held if row[0].line not in done]
    scored: list[dict[str, Any]] = []
    beaten = time.monotonic()
    pending: dict[Future[Said], Any] = {}
    rest = iter(left)
    leave = [False]
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="prompt-run") as pool:
        try:
            while True:
                for row, before in _some(rest, AT_ONCE - len(pending)):
                    text = prompts.text_of(spec.body, row.question, [(s.question, s.answer) for s in shots.of(row)], labels)
                    pending[pool.submit(_ask, spec, text, before, row.line, leave)] = row
                if not pending:
                    break
                finished, _ = wait(pending, timeout=BEAT_SECONDS, return_when=FIRST_COMPLETED)
                scored += [_scored(spec, pending.pop(f), f, labels, totals) for f in finished]
                if time.monotonic() - beaten > BEAT_SECONDS:
                    beaten = time.monotonic()
                    _store(run_id, fence, scored, held, done)
            _store(run_id, fence, scored, held, done)
        finally:
            leave[0] = True


def _store(run_id: uuid.UUID, fence: int, scored: list[dict[str, Any]], held: list[Any], done: set[int]) -> None:
    done |= {row["line"] for row in scored}
    with transaction() as session:
        if not prompt_runs.beat(session, run_id, fence, len(done) / max(len(held), 1), scored):
            raise Stopped
    scored.clear()


def _some(rows: Iterator[Any], count: int) -> Iterator[Any]:
    for _ in range(count):
        row = next(rows, None)
        if row is None:
            return
        yield row


def _ask(spec: RunSpec, text: str, before: list[dict[str, Any]], line: int, leave: list[bool]) -> Said:
    """One row through the engine. Raises what the engine raises; an answer that is left early is thrown away."""
    from worker.generate import answer as answer_of

    body = spec.body
    sampling = Sampling(
        temperature=body.temperature, top_p=1.0, max_tokens=body.max_tokens, n=body.samples, stop=body.stops(), seed=body.seed
    )
    if spec.model.kind == "generic":
        prompt: dict[str, Any] = {"prompt": (f"{body.system}\n\n" if body.system else "") + text}
    else:
        system = [{"role": "system", "content": body.system}] if body.system else []
        prompt = {"messages": [*system, *before, {"role": "user", "content": text}]}
    request = GenerateRequest(
        id=uuid.uuid4(),
        owner=spec.owner,
        model=spec.model,
        engine=spec.engine,
        sampling=sampling,
        seed=(body.seed + line * 31) % 2**31,
        **prompt,
    )
    texts, rendered, tokens, read = [""] * body.samples, "", 0, 0
    with contextlib.closing(answer_of(request)) as answer:
        for entries in answer:
            if leave[0]:
                raise Stopped
            for entry in entries:
                match entry:
                    case Started():
                        rendered, read = entry.rendered_prompt, entry.prompt_tokens
                    case TextPart():
                        texts[entry.index] += entry.text
                    case ChoiceFinished():
                        tokens += entry.tokens
                    case Done():
                        pass
                    case _:
                        raise StudioError(getattr(entry, "message", "The model failed."), code=getattr(entry, "code", None))
    return Said(rendered, texts, read, tokens)


def _scored(spec: RunSpec, row: Any, future: Future[Said], labels: list[str], totals: dict[str, int]) -> dict[str, Any]:
    """A row of the table of results. A prompt too long for the model counts as wrong; any other fault ends the run."""
    body = spec.body
    expected = prompts.take(row.answer, body.reference, body.marker)
    try:
        said = future.result()
    except StudioError as fault:
        if fault.code != "context_length_exceeded":
            raise
        totals["unanswered"] += 1
        return {
            "line": row.line,
            "input": row.question,
            "rendered_prompt": "",
            "expected": expected,
            "said": [fault.message],
            "answer": "",
            "score": 0.0,
        }
    totals["prompt_tokens"] += said.prompt_tokens
    totals["tokens"] += said.tokens
    answer = prompts.majority([prompts.take(text, body.extract, body.marker) for text in said.texts], body.score)
    if body.score == "rouge_l":
        from worker.scores import rouge_l

        score = rouge_l(answer, expected)
    else:
        score = prompts.right(answer, expected, body.score, labels)
    return {
        "line": row.line, "input": row.question, "rendered_prompt": said.prompt, "expected": expected, "said": said.texts,
        "answer": answer, "score": score,
    }  # fmt: skip


# Rows -----------------------------------------------------------------------------------------------------------------


def _rows(spec: RunSpec) -> tuple[list[tuple[Any, list[dict[str, Any]]]], list[Any], list[Any], list[str]]:
    """(rows to ask with the turns before them, training rows, all rows, labels). The split is the one training makes."""
    import random

    from worker.batches import read_rows, split

    rows = read_rows(spec.dataset)
    training, held = split(rows, spec.validation_fraction, spec.split_seed) if spec.part == "validation" else ([], list(rows))
    if len(held) > spec.rows:
        held = sorted(random.Random(spec.split_seed).sample(held, spec.rows), key=lambda row: row.line)
    labels = sorted({str(row.row["label"]) for row in rows if "label" in row.row})
    return [solved(r) for r in held], [solved(r)[0] for r in training], [solved(r)[0] for r in rows], labels


def solved(row: Any) -> tuple[Any, list[dict[str, Any]]]:
    """A normalised row as a question and its answer, and the turns of the conversation before the question."""
    from worker.shots import Solved

    said = row.row
    if "messages" in said:
        messages = said["messages"]
        last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=-1)
        asked = max((i for i, m in enumerate(messages[:last]) if m["role"] == "user"), default=-1) if last > 0 else -1
        if asked < 0:
            return Solved(row.line, "", ""), []
        return Solved(row.line, _words(messages[asked]), _words(messages[last])), [_bare(m) for m in messages[:asked]]
    if "label" in said:
        return Solved(row.line, str(said["text"]), str(said["label"])), []
    return Solved(row.line, str(said.get("prompt", "")), str(said.get("completion", "")).strip()), []


def _words(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _bare(message: dict[str, Any]) -> dict[str, Any]:
    return {"role": message["role"], "content": _words(message)}
