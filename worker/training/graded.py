"""Graders during training: the same validation rows are answered and graded at each evaluation, and their means are curves."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from app import graders
from app.errors import BadData
from app.graders import GradedSample, Grader, item_of
from app.kit import stats
from app.spec import JobSpec
from worker.data.batching import Row
from worker.runtime.device import Compute
from worker.scoring import held_out
from worker.scoring.held_out import HeldOutPrompt

SECONDS = 600.0
"""Time limit of the answers of one evaluation; a row that is not answered in time has no score at this evaluation."""


def grade_of(grader: Grader, row: Row, asked: HeldOutPrompt, text: str) -> graders.Graded:
    """The grade of one answer to the prompt of a row."""
    return graders.scored(grader, graders.grade(grader, GradedSample(text), item_of(row.row, asked.text, asked.reference)))


class RowGrades(NamedTuple):
    """Mean score of each grader by the name of its curve, the first grader's score of each row, why answers had no score, and the answers,
    None for one that was not finished in time."""

    means: dict[str, float]
    first: list[float | None]
    faults: list[str]
    answers: list[str | None]


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

    def measure(self, model: torch.nn.Module, engine: Compute, lead: Sequence[int]) -> RowGrades:
        asked = [question for _, question in self.rows]
        told = held_out.answers_in_batches(model, self.tokenizer, asked, self.most, engine, lead, SECONDS)
        means, faults = dict[str, float](), list[str]()
        first: list[float | None] = []
        for grader, name in zip(self.graders, self.names, strict=True):
            scores: list[float | None] = []
            for (row, question), text in zip(self.rows, told, strict=True):
                if text is None:
                    scores.append(None)
                    continue
                found = grade_of(grader, row, question, text)
                scores.append(found.score)
                faults += [f"{grader.name}: {found.why}"] if found.why else []
            if known := [score for score in scores if score is not None]:
                means[name] = sum(known) / len(known)
            first = first or scores
        return RowGrades(means, first, faults, told)


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
