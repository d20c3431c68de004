"""The body of the task PROMPT: run one prompt on one model, row by row, through this process's engine.

Several rows are requested at once, so the engine answers them in one batch, together with chats: all runs together hold at most
half of its rows. Scored rows are stored every few seconds; a stopped or deleted run ends there.

A few runs go on at once, in their turns (worker/evaluation/turns.py), since each takes minutes or hours.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from app import formats, graders, limits
from app.datasets.splits import split_hash
from app.db import transaction
from app.errors import BadData, StudioError
from app.graders import GradedSample
from app.inference import judges
from app.inference.protocol import GenerateRequest, Sampling
from app.kit.token_meter import TokenMeter
from app.prompts import runs as prompt_runs
from app.prompts import service as prompts
from app.prompts.runs import RunSpec, TrainedRows
from app.tables import PromptRun
from worker.evaluation.row_answers import RowAnswer, RunStopped, RunTotals, answered, each_row, send_here
from worker.evaluation.turns import Turns

log = logging.getLogger(__name__)

RUNS_AT_ONCE = 2
_runs = Turns(RUNS_AT_ONCE)


def begin(run_id: uuid.UUID, going_down: Callable[[], bool] = lambda: False) -> None:
    """Queue the run in this process, and return at once. A run that is queued here already is not added again."""
    _runs.begin(run_id, lambda: work(run_id, going_down), waits=lambda: not _is_trial(run_id))


def _is_trial(run_id: uuid.UUID) -> bool:
    """Whether it is a trial on three rows, for which a person waits; it must not queue behind runs of hours."""
    with transaction() as session:
        return prompt_runs.trial(session, run_id)


def work(run_id: uuid.UUID, going_down: Callable[[], bool] = lambda: False) -> None:
    """Run it, unless another worker holds it. Every error becomes the run's error."""
    with transaction() as session:
        claimed = prompt_runs.claim(session, run_id)
    if claimed is None:
        return
    fence, spec, done, before = claimed
    run, error, stopped = PromptRunAttempt(run_id, fence, spec, done, RunTotals(before)), None, False
    try:
        run.through(going_down)
    except RunStopped:
        stopped = True
    except StudioError as fault:
        error = fault.as_problem()
    except Exception as fault:
        log.exception("The run %s failed.", run_id)
        error = {"code": "internal_error", "message": f"The run failed ({type(fault).__name__}).", "hint": "Try it again."}
    with transaction() as session:
        limits.count_meter(session, PromptRun, run_id, run.meter)  # those of rows that were being answered when it stopped, too
        if not stopped:
            prompt_runs.finish(session, run_id, fence, totals=run.totals.as_json(run.rows), error=error)


class PromptRunAttempt:
    """One attempt at a run: the remaining rows, several at a time, stored every few seconds."""

    def __init__(self, run_id: uuid.UUID, fence: int, spec: RunSpec, done: set[int], totals: RunTotals) -> None:
        self.id, self.fence, self.spec, self.done, self.totals = run_id, fence, spec, done, totals
        self.rows = len(done)
        self.scored: list[dict[str, Any]] = []
        self.meter = TokenMeter()

    def through(self, going_down: Callable[[], bool]) -> None:
        from worker.evaluation.few_shot import Shots

        held, training, everything, labels = _rows(self.spec)
        self.rows = len(held)
        self.store()  # reading many rows takes a while, and so does finding similar ones
        shots = Shots(self.spec.body, training, everything)
        self.store()
        rest = (
            (row, before, prompts.text_of(self.spec.body, row.question, [(s.question, s.answer) for s in shots.of(row)], labels))
            for row, before in held
            if row.line not in self.done
        )

        def work(given: Any, leave: list[bool]) -> tuple[RowAnswer, dict[str, Any]]:
            row, before, text = given
            return _ask_and_score(self.spec, text, before, row, labels, leave, self.meter)

        each_row(rest, work, self.take, self.store, going_down)
        if not self.done and self.totals.first_fault:
            fault = self.totals.first_fault
            message = f"None of the {self.rows} rows got an answer. The first: {fault.message}"
            raise StudioError(message, hint=fault.hint, code=fault.code)

    def take(self, given: Any, future: Future[tuple[RowAnswer, dict[str, Any]]]) -> None:
        try:
            said, scored = future.result()
        except StudioError as fault:
            self.totals.failed(given[0].line, fault)
            return
        self.totals.answered(said)
        self.scored.append(scored)

    def store(self) -> None:
        """Renew the lease, and store what was scored and the tokens of it. Raises RunStopped when the lease is lost."""
        self.done |= {row["line"] for row in self.scored}
        share = (len(self.done) + len(self.totals.unanswered)) / max(self.rows, 1)
        with transaction() as session:
            held = prompt_runs.heartbeat(session, self.id, self.fence, min(1.0, share), self.scored, self.totals.as_json(self.rows))
            limits.count_meter(session, PromptRun, self.id, self.meter)
        if not held:
            raise RunStopped
        self.scored.clear()


def _ask_and_score(
    spec: RunSpec, text: str, before: list[dict[str, Any]], row: Any, labels: list[str], leave: list[bool], meter: TokenMeter
) -> tuple[RowAnswer, dict[str, Any]]:
    said = _ask(spec, text, before, row.line, leave, meter)
    return said, _scored(spec, row, said, labels, meter)


def _ask(spec: RunSpec, text: str, before: list[dict[str, Any]], line: int, leave: list[bool], meter: TokenMeter) -> RowAnswer:
    """Request the answer to one row. Raises what the engine raises; a cancelled answer is discarded, but its tokens count."""
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
        bulk=True,
        sampling=sampling,
        seed=(body.seed + line * 31) % 2**31,
        **prompt,
    )
    return answered(request, body.samples, leave, meter)


def _scored(spec: RunSpec, row: Any, said: RowAnswer, labels: list[str], meter: TokenMeter) -> dict[str, Any]:
    """A row of the table of results."""
    body = spec.body
    expected = prompts.take(row.answer, body.reference, body.marker)
    answer = prompts.majority([prompts.take(text, body.extract, body.marker) for text in said.texts], body.score)
    if spec.grader is not None:
        score = _graded(spec, row, answer, meter)
    elif body.score == "rouge_l":
        from worker.scoring.metrics import rouge_l

        score = rouge_l(answer, expected)
    else:
        score = prompts.right(answer, expected, body.score, labels)
    return {
        "line": row.line, "input": row.question, "rendered_prompt": said.prompt, "expected": expected, "said": said.texts,
        "answer": answer, "score": score,
    }  # fmt: skip


def _graded(spec: RunSpec, row: Any, answer: str, meter: TokenMeter) -> float:
    """The grader's score of an answer. Raises StudioError for one that it cannot score, which excludes the row."""
    grader = graders.parse(spec.grader)
    item = graders.item_of({}, row.question, row.answer)
    found = graders.scored(
        grader, graders.grade(grader, GradedSample(answer), item, judges.answers(spec.owner, spec.judges, send_here, meter))
    )
    if found.score is None:
        fault = StudioError(f"The grader gave no score: {found.why}", hint="Try the grader on some rows first.", code="not_graded")
        fault.status = 503 if found.error and found.error[0] == "model_grader_server_error" else 400
        raise fault
    return found.score


# Rows -----------------------------------------------------------------------------------------------------------------


def _rows(spec: RunSpec) -> tuple[list[tuple[Any, list[dict[str, Any]]]], list[Any], list[Any], list[str]]:
    """(rows to run with the messages before them, training rows, all rows, labels). The split is the one training makes."""
    from worker.data.batching import read_rows, split

    rows = read_rows(spec.dataset)
    training: list[Any] = []
    held = list(rows)
    if spec.part == "validation":
        if spec.validation_fraction < 1:
            training, held = split(rows, spec.validation_fraction, spec.split_seed, spec.split)
        taught = {key for one in spec.learnt for key in _trained_keys(one)}
        held = [row for row in held if split_hash(row.row, "") not in taught]
        if not held:
            raise BadData(
                f"Every row of {spec.dataset.name} was in the training set of a model that is compared here.",
                hint="Use the dataset it was validated on, or fine-tune it again with a validation split.",
            )
    # The rows with the smallest keys: a smaller sample is a subset of a larger one, whatever is compared.
    held = sorted(held, key=lambda row: split_hash(row.row, f"{spec.split_seed} lab"))[: spec.rows]
    held.sort(key=lambda row: row.line)
    labels = sorted({label for row in rows if (label := formats.of(row.row).label(row.row)) is not None})
    asked, examples, everything = ([prompts.solved(row.line, row.row) for row in some] for some in (held, training, rows))
    return asked, [row for row, _ in examples], [row for row, _ in everything], labels


def _trained_keys(one: TrainedRows) -> list[bytes]:
    """Keys of the rows that a job was trained on."""
    from worker.data.batching import read_rows, split

    training, _ = split(read_rows(one.dataset), one.validation_fraction, one.seed, one.split)
    return [split_hash(row.row, "") for row in training]
