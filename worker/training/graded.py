"""Graders during training: the same validation rows are answered and graded at each evaluation, and their means are curves."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from app import graders
from app.errors import BadData, StudioError
from app.graders import Ask, GradedSample, Grader, Reply, item_of
from app.kit import stats
from app.spec import JobSpec
from worker.data.batching import Row
from worker.runtime.device import Compute
from worker.scoring import held_out
from worker.scoring.answers import answering
from worker.scoring.held_out import HeldOutPrompt

Answer = Callable[[Ask], Reply]
"""Asks a model for a grader."""
SECONDS = 600.0
"""Time limit of the answers of one evaluation; a row that is not answered in time has no score at this evaluation."""


AT_ONCE = 8
"""Answers that are graded at the same time where a model is asked."""


class ModelAway(StudioError):
    """A model that a grader asks could not be asked: what would be learned without it is not what was wanted."""

    status, code, type = 503, "model_away", "server_error"


class GivenAnswer(NamedTuple):
    """An answer to the prompt of a row."""

    row: Row
    asked: HeldOutPrompt
    text: str
    calls: Sequence[dict[str, Any]] | None = None  # of tools, in all turns of a conversation; None: those in the text


def grading(grader: Grader, answers: Sequence[GivenAnswer], answer: Answer) -> Generator[float, None, list[graders.Graded]]:
    """The grades of answers, in their order; yields the share that is done. Raises ModelAway."""
    found: list[graders.Graded] = []
    at_once = AT_ONCE if any(True for _ in grader.models()) else 1
    with ThreadPoolExecutor(at_once, thread_name_prefix="grading") if at_once > 1 else nullcontext() as pool:
        for start in range(0, len(answers), at_once):
            yield start / len(answers)
            part = answers[start : start + at_once]
            found += pool.map(lambda one: _grade(grader, one, answer), part) if pool else [_grade(grader, one, answer) for one in part]
            if away := next((one.why for one in found[start:] if one.error and one.error[0] == AWAY), None):
                hint = "Bring that model back, then resume: nothing is lost."
                raise ModelAway(f"The grader {grader.name} could not ask its model. {away}", hint=hint)
    return found


AWAY = "model_grader_server_error"


def _grade(grader: Grader, given: GivenAnswer, answer: Answer) -> graders.Graded:
    item = item_of(given.row.row, given.asked.text, given.asked.reference)
    return graders.scored(grader, graders.grade(grader, GradedSample(given.text, given.calls), item, answer))


class RowGrades(NamedTuple):
    """Mean score of each grader by the name of its curve, the first grader's score of each row, why answers had no score, and the answers,
    None for one that was not finished in time; `others` are the scores of each row by the further graders."""

    means: dict[str, float]
    first: list[float | None]
    faults: list[str]
    answers: list[str | None]
    others: list[list[float | None]] = []  # noqa: RUF012  # never changed


class GradedRows:
    """The rows that a job's graders read, as prompts; made once."""

    def __init__(self, spec: JobSpec, tokenizer: Any, rows: Sequence[Row], room: int) -> None:
        self.tokenizer, self.most = tokenizer, spec.run.sample_tokens
        self.graders = [graders.parse(one) for one in spec.graders]
        asked = [(row, held_out.questions(tokenizer, [row], spec.model.kind, 1, room)) for row in rows]
        self.rows = [(row, found[0]) for row, found in asked if found][: spec.run.graded_rows]
        if not self.rows:
            raise BadData("No validation row has a prompt to grade answers to.", hint="Leave graders out, or take rows with prompts.")
        self.names = _curves([grader.name for grader in self.graders])

    def measuring(self, model: torch.nn.Module, engine: Compute, lead: Sequence[int], answer: Answer) -> Generator[float, None, RowGrades]:
        """The grades of the likeliest answers; yields the share that is written, and the share that each grader has done. Raises ModelAway."""
        asked = [question for _, question in self.rows]
        told = yield from answering(SECONDS, model, self.tokenizer, asked, self.most, engine, lead)
        given = [None if text is None else GivenAnswer(*row, text) for row, text in zip(self.rows, told, strict=True)]
        return (yield from self.grades_of(given, answer))

    def grades_of(self, answers: Sequence[GivenAnswer | None], answer: Answer) -> Generator[float, None, RowGrades]:
        """The grades of an answer to each row, None for one that was not finished. Raises ModelAway."""
        means, faults = dict[str, float](), list[str]()
        by_grader: list[list[float | None]] = []
        given = {i: one for i, one in enumerate(answers) if one is not None}
        for grader, name in zip(self.graders, self.names, strict=True):
            grades = dict(zip(given, (yield from grading(grader, list(given.values()), answer)), strict=True))
            scores = [grades[i].score if i in grades else None for i in range(len(answers))]
            faults += [f"{grader.name}: {one.why}" for one in grades.values() if one.why]
            if known := [score for score in scores if score is not None]:
                means[name] = sum(known) / len(known)
            by_grader.append(scores)
        told = [None if one is None else one.text for one in answers]
        return RowGrades(means, by_grader[0], faults, told, by_grader[1:])


def _curves(names: Sequence[str]) -> list[str]:
    """Names of the curves: `grader_exact_match`; graders whose names differ in signs only get a number."""
    found: list[str] = []
    for name in names:
        plain = f"grader_{re.sub(r'[^a-z0-9]+', '_', name.lower()).strip('_')}"
        found.append(plain if plain not in found else f"{plain}_{len(found) + 1}")
    return found


def clearly_better(before: Sequence[float | None], now: Sequence[float | None]) -> bool:
    """Whether the scores of the same rows rose beyond chance: the 95% interval of their mean difference is above zero."""
    both = [(a, b) for a, b in zip(before, now, strict=False) if a is not None and b is not None]
    low_high = stats.paired([a for a, _ in both], [b for _, b in both])
    return low_high is not None and low_high[0] > 0
