"""Asks models for graders, and a server for answers: a trainer has no network, so its supervisor asks for it (`worker/supervision/answering.py`)."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future

from app.errors import BadData
from app.graders import Ask, GradeError, Reply
from app.inference.questions import DrawAsk, DrawnTokens, Question, QuestionAnswer
from worker.training.graded import ModelAway


class Asker:
    """Sends each question as a line to one pipe and reads the replies from another, in whatever order they come. Thread-safe."""

    def __init__(self, questions: int, answers: int) -> None:
        self._out = os.fdopen(questions, "wb")
        self._in = os.fdopen(answers, "rb")
        self._lock, self._numbers = threading.Lock(), itertools.count()
        self._waiting: dict[int, Future[QuestionAnswer]] = {}
        self._closed = False
        threading.Thread(target=self._read, name="answers", daemon=True).start()

    def __call__(self, ask: Ask) -> Reply:
        """Raises GradeError: of the kind `model_grader_server_error` where the model could not be asked."""
        found = self._answer(Question.of(next(self._numbers), ask))
        if found.reply is not None:
            return found.reply
        raise GradeError("model_grader_server_error" if found.away else "other_error", found.error)

    def draw(self, ask: DrawAsk) -> Sequence[DrawnTokens]:
        """Answers of the server that answers for the base model. Raises ModelAway where it could not be asked, and BadData where it refuses."""
        found = self._answer(Question(id=next(self._numbers), draw=ask))
        if found.drawn is not None:
            return found.drawn
        if found.away:
            hint = "Bring that server back, then resume: nothing is lost."
            raise ModelAway(f"The server that draws the answers could not be asked. {found.error}", hint=hint)
        raise BadData(f"The server that draws the answers refused. {found.error}", hint="Let the worker draw: leave sampler out.")

    def _answer(self, question: Question) -> QuestionAnswer:
        number, coming = question.id, Future[QuestionAnswer]()
        line = question.model_dump_json(exclude_none=True).encode() + b"\n"
        with self._lock:
            if self._closed:
                return QuestionAnswer(id=number, error="The supervisor of this trainer answers no questions any more.", away=True)
            self._waiting[number] = coming
            try:
                self._out.write(line)
                self._out.flush()
            except OSError:
                return QuestionAnswer(id=number, error="The supervisor of this trainer has gone.", away=True)
        return coming.result()

    def _read(self) -> None:
        for line in self._in:
            found = QuestionAnswer.model_validate_json(line)
            with self._lock:
                waiting = self._waiting.pop(found.id, None)
            if waiting is not None:
                waiting.set_result(found)
        with self._lock:
            self._closed, left = True, list(self._waiting.values())
        for one in left:
            one.set_result(QuestionAnswer(id=-1, error="The supervisor of this trainer has gone.", away=True))
