"""Answers the questions that a trainer's graders have for models, and has a server draw for it: the trainer is confined and has no network.

What comes over the pipe is a stranger's word. Only the models that the job's spec names are asked, each as the grader's fields allow.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pydantic import ValidationError

from app.db import transaction
from app.errors import StudioError, Unavailable
from app.graders import Ask, GradeError, Reply
from app.inference import judges
from app.inference.protocol import LLAMA_CPP
from app.inference.questions import MAX_LINE_BYTES, SERVED, DrawAsk, DrawnTokens, Question, QuestionAnswer
from app.inference.server_draws import ServerDraws
from app.jobs.lifecycle import Claim
from app.kit.token_meter import TokenMeter
from app.objectives.reinforcement import ReinforcementSettings
from app.spec import AskedModel, JobSpec
from app.tables import Job

log = logging.getLogger(__name__)
AT_ONCE = 8
"""Questions that are asked at the same time."""
PAUSES = (1.0, 4.0, 15.0)
"""Seconds before a model that could not be asked is asked again."""
MAX_TOKENS = 4096
"""Of a judge's answer, as its grader allows at most."""


class QuestionDesk:
    """The supervisor's ends of two pipes. The trainer is started with `options` and inherits `files`, the other ends; `over` is set once
    nobody waits for answers any more."""

    def __init__(self, held: Claim, over: threading.Event, folder: Path) -> None:
        """`folder` is the attempt's."""
        self._over, self._lock, self.meter = over, threading.Lock(), TokenMeter()
        with transaction() as session:
            owner = session.get_one(Job, held.job_id).owner_id
            known = [judges.pinned(session, one) for one in held.spec.judges]
            base = judges.pinned(session, AskedModel(name="", model=held.spec.model))
        self._server = None
        if _wants_a_server(held.spec) and base.engine is not None and base.engine.via == "tokens" and base.engine.url != LLAMA_CPP:
            self._server = ServerDraws(base.engine, folder / SERVED, f"luthier-{held.job_id.hex[:12]}-{held.fence}")
        self._draw = (self._server or _nothing_draws) if _wants_a_server(held.spec) else None
        self._answer = judges.answers(owner, known, judges.send_and_wait, self.meter)
        reads, asks = os.pipe()
        hears, writes = os.pipe()
        self._questions, self._answers = os.fdopen(reads, "rb"), os.fdopen(writes, "wb")
        self.files = (asks, hears)
        self.options = ["--questions-fd", str(asks), "--answers-fd", str(hears)]

    def listen(self) -> None:
        """Answer in threads until the trainer has gone. Called once it was started: the ends that it inherited are closed here."""
        for file in self.files:
            os.close(file)
        threading.Thread(target=self._read, name="questions", daemon=True).start()

    def _read(self) -> None:
        with self._questions as pipe, ThreadPoolExecutor(AT_ONCE, thread_name_prefix="answering") as pool:
            while line := pipe.readline(MAX_LINE_BYTES):
                try:
                    question = Question.model_validate_json(line)
                except ValidationError:
                    log.warning("A trainer sent something that is no question: %r", line[:200])
                    break
                pool.submit(self._reply, question)
        if self._server:
            self._server.close()
        with contextlib.suppress(OSError):
            self._answers.close()

    def _reply(self, question: Question) -> None:
        found = answered(question, self._answer, self._over.wait, self._draw)
        with self._lock, contextlib.suppress(OSError):  # it has left
            self._answers.write(found.model_dump_json().encode() + b"\n")
            self._answers.flush()


def asks(spec: JobSpec) -> bool:
    """Whether a trainer of this job asks its supervisor anything."""
    return bool(spec.judges) or _wants_a_server(spec)


def _wants_a_server(spec: JobSpec) -> bool:
    return isinstance(spec.preference, ReinforcementSettings) and spec.preference.sampler == "server"


Draw = Callable[[DrawAsk], tuple[DrawnTokens, ...]]


def _nothing_draws(ask: DrawAsk) -> tuple[DrawnTokens, ...]:
    raise Unavailable(
        "No server that takes tokens answers for the base model any more.", hint="Choose one on the model's page, then resume."
    )


def answered(
    question: Question, answer: Callable[[Ask], Reply], wait: Callable[[float], object] = time.sleep, draw: Draw | None = None
) -> QuestionAnswer:
    """The reply to one question; a model that could not be asked is asked again after each of PAUSES."""
    wanted, ask = question.draw if draw else None, question.ask
    if (wanted or ask) is None or (question.judge is not None and question.judge.max_tokens > MAX_TOKENS):
        return QuestionAnswer(id=question.id, error="This is no question that a grader asks.")
    for pause in (*PAUSES, None):
        try:
            if draw and wanted:
                return QuestionAnswer(id=question.id, drawn=draw(wanted))
            assert ask is not None, "it is one or the other"
            return QuestionAnswer(id=question.id, reply=answer(ask))
        except GradeError as error:
            return QuestionAnswer(id=question.id, error=error.message)
        except StudioError as error:
            found = QuestionAnswer(id=question.id, error=str(error), away=is_away(error))
        except Exception as error:
            log.exception("A question of a trainer failed.")
            found = QuestionAnswer(id=question.id, error=f"{type(error).__name__}: {error}"[:500], away=True)
        if not found.away or pause is None or wait(pause):
            return found
    raise AssertionError("the last pause is None")


def is_away(error: StudioError) -> bool:
    """Whether the model could not be asked, rather than this question be answered: its server, its worker or its files are not there."""
    return error.status >= 500 or error.status == 429 or error.code == "bad_model"
