"""Selects the few-shot examples of a question."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

import numpy as np

from app.errors import BadData
from app.prompts.service import PromptBody, Solved


class Shots:
    """Selects examples for one question after another, from training rows only.

    Random and balanced draws are functions of the prompt's seed and the question, so a resumed run draws the same again. Similar
    ones are the nearest by the cosine of TF-IDF vectors (Salton and Buckley 1988), the nearest last, next to the question (Liu et
    al. 2022, What Makes Good In-Context Examples for GPT-3?, https://arxiv.org/abs/2101.06804).
    """

    def __init__(self, body: PromptBody, training: Sequence[Solved], everything: Sequence[Solved]) -> None:
        self.body, self.training = body, training
        self.chosen: list[Solved] = []
        count = body.shots
        if body.choose == "chosen":
            by_line = {row.line: row for row in everything}
            missing = next((line for line in body.lines if line not in by_line), None)
            if missing is not None:
                raise BadData(f"The dataset has no line {missing} to take an example from.", hint="Name lines it has.")
            self.chosen = [by_line[line] for line in body.lines]
        elif count and not training:
            raise BadData("There are no training rows to take examples from.", hint="Hold out fewer rows, or name the lines.")
        if body.choose == "similar" and count:
            from sklearn.feature_extraction.text import TfidfVectorizer

            self.vectors = TfidfVectorizer(lowercase=True, sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")  # noqa: S106
            self.matrix = self.vectors.fit_transform([row.question for row in training])
        if body.choose == "balanced" and count:
            self.groups: dict[str, list[Solved]] = {}
            for row in training:
                self.groups.setdefault(row.answer.strip(), []).append(row)

    def of(self, asked: Solved) -> list[Solved]:
        """The examples for a question, in the order they are shown; never the question's own row."""
        count = min(self.body.shots, len(self.training))
        if self.body.choose == "chosen":
            return [row for row in self.chosen if row.line != asked.line]
        if not count:
            return []
        if self.body.choose == "similar":
            near = (self.matrix @ self.vectors.transform([asked.question]).T).toarray().ravel()
            return [self.training[i] for i in np.argsort(-near, kind="stable")[:count]][::-1]
        digest = hashlib.sha256(f"{self.body.seed}\n{asked.question}".encode()).digest()
        draw = random.Random(digest)
        if self.body.choose == "random":
            return draw.sample(list(self.training), count)
        return self._balanced(draw, count)

    def _balanced(self, draw: random.Random, count: int) -> list[Solved]:
        """Equal numbers of each answer, give or take one, shuffled so that their order carries no pattern."""
        groups = [draw.sample(rows, len(rows)) for rows in self.groups.values()]
        draw.shuffle(groups)
        found: list[Solved] = []
        while len(found) < count:
            for rows in groups:
                if rows and len(found) < count:
                    found.append(rows.pop())
        draw.shuffle(found)
        return found
