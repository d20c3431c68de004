"""Graders over the answers of an evaluation: mean, interval and the score of every row, the base beside the fine-tuned model.

It runs in the process that holds the evaluation's lease, which may ask judges; the evaluation process, which opens foreign models, has
no network.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from sqlalchemy.orm import Session

from app import graders, objectives, saved_graders
from app.errors import BadField
from app.graders import Ask, Graded, GradedSample, GradeError, Grader, Reply
from app.inference import judges
from app.kit import stats
from app.languages import gettext
from app.tables import User

JSON = dict[str, Any]
AT_ONCE = 4
MAX_STRIKES = 8
"""A judge that could not be asked so many times in a row is not asked any more."""
SIDES = ("base", "tuned")


USUAL_ANSWERS = 100
"""Rows that are answered where graders are named and no number of answers is."""


def ordered(
    session: Session, user: User, given: Sequence[str | JSON], kind: str, task: str, rows: int, answers: int | None
) -> dict[str, Any]:
    """The graders of an evaluation's spec, the models that they ask, and the number of answers. Raises NotFound and BadField."""
    if kind != "scores" or objectives.get(task).classifies:
        raise BadField(
            gettext("Graders score generated answers, which this evaluation has none of."),
            hint=gettext("Take kind scores and a dataset of answers, or leave graders out."),
            param="graders",
        )
    if answers == 0:
        raise BadField(gettext("Graders need answers."), hint=gettext("Ask for some, or leave graders out."), param="answers")
    found = saved_graders.named(session, user, given)
    return {
        "graders": tuple(map(graders.to_json, found)),
        "judges": judges.resolve(session, user, found),
        "answers": answers or min(rows, USUAL_ANSWERS),
    }


class PatientJudges:
    """Asks judges until they failed MAX_STRIKES times in a row; then every further question fails at once."""

    def __init__(self, answer: Callable[[Ask], Reply]) -> None:
        self._answer, self._lock = answer, threading.Lock()
        self.strikes, self.last = 0, ""

    def __call__(self, ask: Ask) -> Reply:
        if self.strikes >= MAX_STRIKES:
            raise GradeError("model_grader_server_error", self.last)
        try:
            found = self._answer(ask)
        except Exception as error:
            with self._lock:
                self.strikes, self.last = self.strikes + 1, str(error)
            raise
        with self._lock:
            self.strikes = 0
        return found


def measure(
    given: Sequence[Grader], rows: Sequence[JSON], answer: Callable[[Ask], Reply], going: Callable[[float], bool] = lambda share: True
) -> JSON | None:
    """`{"graders": […], "graded": […]}` of rows with `line`, `item`, and the answers `base` (None where there is no base) and `tuned`.

    `going` is told the share that is done about five times a second; None as soon as it says no.
    """
    tasks = [(grader, row, side) for grader in given for row in rows for side in SIDES if row.get(side) is not None]
    asked, found = PatientJudges(answer), dict[int, Graded]()
    waiting = dict[Future[Graded], int]()
    rest = iter(range(len(tasks)))
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="grading") as pool:
        while len(found) < len(tasks):
            for place in rest:
                waiting[pool.submit(_grade, *tasks[place], asked)] = place
                if len(waiting) >= 2 * AT_ONCE:
                    break
            done, _ = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
            for future in done:
                found[waiting.pop(future)] = future.result()
            if not going(len(found) / len(tasks)):
                return None
    by_task = {(tasks[place][0].name, tasks[place][1]["line"], tasks[place][2]): one for place, one in found.items()}
    return {"graders": [_summary(grader, rows, by_task) for grader in given], "graded": [_row(given, row, by_task) for row in rows]}


def _grade(grader: Grader, row: JSON, side: str, answer: Callable[[Ask], Reply]) -> Graded:
    return graders.scored(grader, graders.grade(grader, GradedSample(row[side]), row["item"], answer))


Found = Mapping[tuple[str, int, str], Graded]


def _summary(grader: Grader, rows: Sequence[JSON], found: Found) -> JSON:
    """One grader over the rows that every model has a score for."""
    every = [[found[grader.name, row["line"], side] for side in SIDES if row.get(side) is not None] for row in rows]
    scored = [[one.score for one in sides if one.score is not None] for sides in every]
    kept = [scores for scores, sides in zip(scored, every, strict=True) if len(scores) == len(sides)]
    errors: dict[str, int] = {}
    for one in (one for sides in every for one in sides if one.error):
        errors[one.why] = errors.get(one.why, 0) + 1
    tokens = sum(count for sides in every for one in sides for count in one.tokens.values())
    grades = [one for sides in every for one in sides]
    tuned, base = [scores[-1] for scores in kept], [scores[0] for scores in kept if len(scores) == 2]
    return {
        "name": grader.name,
        "type": grader.type,
        "rows": len(kept),
        "failed": len(rows) - len(kept),
        "score": sum(tuned) / len(tuned) if tuned else None,
        "interval": stats.interval(tuned) if tuned else None,
        "base": sum(base) / len(base) if base else None,
        "base_interval": stats.interval(base) if base else None,
        "difference": stats.paired(base, tuned) if base else None,
        "errors": [{"message": message, "count": count} for message, count in sorted(errors.items(), key=lambda one: -one[1])[:5]],
        "parts": _parts([sides for sides, scores in zip(every, scored, strict=True) if len(scores) == len(sides)]),
        "seconds": sum(one.seconds for one in grades),
        "tokens": tokens,
    }


def _parts(rows: Sequence[Sequence[Graded]]) -> dict[str, JSON]:
    """The means of the figures that a grade is made of. A row counts for those that its grade has, so that `rows` differ."""
    found: dict[str, JSON] = {}
    for name in dict.fromkeys(name for sides in rows for one in sides for name in one.parts):
        tuned = [sides[-1].parts[name] for sides in rows if name in sides[-1].parts]
        base = [sides[0].parts[name] for sides in rows if len(sides) == 2 and name in sides[0].parts]
        found[name] = {
            "score": sum(tuned) / len(tuned) if tuned else None,
            "rows": len(tuned),
            "base": sum(base) / len(base) if base else None,
            "base_rows": len(base),
        }
    return found


def _row(given: Sequence[Grader], row: JSON, found: Found) -> JSON:
    """One row: both answers, and each grader's scores with the reason where there is none."""
    scores = {}
    for grader in given:
        sides = {side: found.get((grader.name, row["line"], side)) for side in SIDES}
        error = next((one.why for one in sides.values() if one and one.error), None)
        scores[grader.name] = {**{side: one.score if one else None for side, one in sides.items()}, "error": error}
    item = row["item"]
    return {
        "line": row["line"],
        "prompt": str(item["prompt"])[:2000],
        "reference": str(item["reference"])[:2000],
        "base_answer": row.get("base"),
        "tuned_answer": row["tuned"],
        "scores": scores,
    }
