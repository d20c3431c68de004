"""Runs of distillation: a teacher answers prompts, a grader scores the answers, and the best of each prompt is kept (app/distillations).

Like a run of a prompt it lives in the process that has the engine, and several prompts are answered at once. Answers are stored every few
seconds; a cancelled run ends there.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from app import formats, graders, limits
from app.datasets.splits import split_hash
from app.db import transaction
from app.distillations import service as distillations
from app.distillations.service import DistillationSpec
from app.errors import StudioError
from app.graders import Graded, GradedSample, Grader
from app.inference import judges
from app.inference.protocol import GenerateRequest, Sampling
from app.kit.token_meter import TokenMeter
from app.tables import DistillationRun
from worker.evaluation.row_answers import RowAnswer, RunStopped, RunTotals, answered, each_row, send_here
from worker.evaluation.turns import Turns

log = logging.getLogger(__name__)
RUNS_AT_ONCE = 1
_runs = Turns(RUNS_AT_ONCE)


def begin(run_id: uuid.UUID, going_down: Callable[[], bool] = lambda: False) -> None:
    """Queue the run in this process, and return at once. A run that is queued here already is not added again."""
    _runs.begin(run_id, lambda: work(run_id, going_down))


def work(run_id: uuid.UUID, going_down: Callable[[], bool] = lambda: False) -> None:
    """Run it, unless another worker holds it. Every error becomes the run's error."""
    with transaction() as session:
        claimed = distillations.claim(session, run_id)
    if claimed is None:
        return
    fence, spec, done, before = claimed
    run, error = DistillationAttempt(run_id, fence, spec, done, RunTotals(before)), None
    try:
        run.through(going_down)
    except RunStopped:
        return run.count_tokens()
    except StudioError as fault:
        error = fault.as_problem()
    except Exception as fault:
        log.exception("The distillation %s failed.", run_id)
        error = {"code": "internal_error", "message": f"The run failed ({type(fault).__name__}).", "hint": "Try it again."}
    run.count_tokens()
    totals = run.totals.as_json(run.prompts)
    with transaction() as session:
        if error:
            distillations.fail(session, run_id, fence, error, distillations.summary(session, run_id) | totals)
        else:
            distillations.finish(session, run_id, fence, totals)


class DistillationAttempt:
    """One attempt at a run: the prompts that are not answered yet."""

    def __init__(self, run_id: uuid.UUID, fence: int, spec: DistillationSpec, done: set[int], totals: RunTotals) -> None:
        self.id, self.fence, self.spec, self.done, self.totals = run_id, fence, spec, done, totals
        self.prompts = len(done)
        self.answered: list[dict[str, Any]] = []
        self.meter = TokenMeter()
        self.grader: Grader | None = graders.parse(spec.grader) if spec.grader else None
        self.judge = judges.answers(spec.owner, spec.judges, send_here, self.meter)

    def through(self, going_down: Callable[[], bool]) -> None:
        from worker.data.batching import read_rows

        rows = sorted(read_rows(self.spec.dataset), key=lambda row: split_hash(row.row, f"{self.spec.seed} distill"))[: self.spec.rows]
        rows.sort(key=lambda row: row.line)
        self.prompts = len(rows)
        self.store()
        each_row(iter([row for row in rows if row.line not in self.done]), self._work, self.take, self.store, going_down)
        if not self.done and (fault := self.totals.first_fault):
            message = f"None of the {self.prompts} prompts got an answer. The first: {fault.message}"
            raise StudioError(message, hint=fault.hint, code=fault.code)

    def _work(self, row: Any, leave: list[bool]) -> tuple[RowAnswer, dict[str, Any]]:
        question, reference, before = formats.of(dict(row.row)).solved(dict(row.row))
        told = [*before, {"role": "user", "content": question}]
        messages = [{"role": "system", "content": self.spec.system}, *_without_system(told)] if self.spec.system else told
        said = answered(_request(self.spec, messages, row.line), self.spec.answers, leave, self.meter)
        item = graders.item_of(row.row, question, reference)
        grades = [self._grade(text, item) if not cut else None for text, cut in zip(said.texts, said.cut, strict=True)]
        return said, _kept(row.line, messages, said, grades, self.spec.threshold)

    def _grade(self, text: str, item: dict[str, Any]) -> Graded:
        """The grade of a whole answer; 1 for each where there is no grader. Raises StudioError where its model cannot be asked."""
        if self.grader is None:
            return Graded(1.0, 1.0 if text.strip() else 0.0)
        found = graders.scored(self.grader, graders.grade(self.grader, GradedSample(text), item, self.judge))
        if found.error and found.error[0] == "model_grader_server_error":
            fault = StudioError(f"The grader {self.grader.name} could not ask its model. {found.why}", hint="Bring that model back.")
            fault.status, fault.code = 503, "model_away"
            raise fault
        return found

    def take(self, row: Any, future: Future[tuple[RowAnswer, dict[str, Any]]]) -> None:
        try:
            said, kept = future.result()
        except StudioError as fault:
            self.totals.failed(row.line, fault)
            return
        self.totals.answered(said)
        self.answered.append(kept)

    def store(self) -> None:
        """Renew the lease, and store the answers and the tokens of them. Raises RunStopped when the lease is lost."""
        self.done |= {row["line"] for row in self.answered}
        share = (len(self.done) + len(self.totals.unanswered)) / max(self.prompts, 1)
        totals = self.totals.as_json(self.prompts)
        with transaction() as session:
            held = distillations.heartbeat(session, self.id, self.fence, min(1.0, share), self.answered, totals)
        self.count_tokens()
        if not held:
            raise RunStopped
        self.answered.clear()

    def count_tokens(self) -> None:
        with transaction() as session:
            limits.count_meter(session, DistillationRun, self.id, self.meter)


def _without_system(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one for one in messages if one["role"] != "system"]


def _request(spec: DistillationSpec, messages: Sequence[dict[str, Any]], line: int) -> GenerateRequest:
    """The request for the answers to one prompt. Its random numbers follow from the seed and the line."""
    sampling = Sampling(temperature=spec.temperature, top_p=1.0, max_tokens=spec.max_tokens, n=spec.answers, seed=spec.seed)
    said = [{"role": one["role"], "content": one.get("content") or ""} for one in messages]
    given: dict[str, Any] = {"messages": said}
    if spec.teacher.kind == "generic" and spec.engine is None:  # it has no turns
        given = {"prompt": "\n\n".join(one["content"] for one in said)}
    seed = (spec.seed + line * 31) % 2**31
    return GenerateRequest(
        id=uuid.uuid4(), owner=spec.owner, model=spec.teacher, engine=spec.engine, bulk=True, sampling=sampling, seed=seed, **given
    )  # fmt: skip


def _kept(
    line: int, messages: Sequence[dict[str, Any]], said: RowAnswer, grades: Sequence[Graded | None], threshold: float
) -> dict[str, Any]:
    """The row of a prompt: its answers with their scores, and the place of the best one, the first of equals, where it reaches the
    threshold. An answer that the limit cut has no score."""
    answers = [
        {"text": text, "score": grade.score if grade else None, "why": grade.why if grade else "It was cut off by max_tokens."}
        for text, grade in zip(said.texts, grades, strict=True)
    ]
    known = [
        (grade.score, -place)
        for place, (text, grade) in enumerate(zip(said.texts, grades, strict=True))
        if grade and grade.score is not None and text.strip()
    ]
    score, place = max(known, default=(-1.0, 0))
    return {"line": line, "messages": list(messages), "answers": answers, "best": -place if score >= threshold else None}
