"""Asks models for graders: a trainer has no network, so its supervisor asks for it (`worker/supervision/answering.py`)."""

from __future__ import annotations

import itertools
import os
import threading
from concurrent.futures import Future

from app.graders import Ask, GradeError, Reply
from app.inference.questions import Question, QuestionAnswer


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
        number, coming = next(self._numbers), Future[QuestionAnswer]()
        line = Question.of(number, ask).model_dump_json(exclude_none=True).encode() + b"\n"
        with self._lock:
            if self._closed:
                raise GradeError("model_grader_server_error", "The supervisor of this trainer answers no questions any more.")
            self._waiting[number] = coming
            try:
                self._out.write(line)
                self._out.flush()
            except OSError:
                raise GradeError("model_grader_server_error", "The supervisor of this trainer has gone.") from None
        found = coming.result()
        if found.reply is not None:
            return found.reply
        raise GradeError("model_grader_server_error" if found.away else "other_error", found.error)

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
