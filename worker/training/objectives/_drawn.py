"""What the objectives share that train on answers which the model draws: prompts, their validation, and the packs of a step's answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from app import events
from app.errors import BadData
from app.objectives import DrawnSettings
from app.spec import JobSpec
from worker.data import batching
from worker.data.batching import Row
from worker.data.chat_template import prepare_tokenizer
from worker.data.packing import best_fit
from worker.runtime.device import Compute
from worker.scoring import held_out
from worker.training.checkpoint import State
from worker.training.graded import GradedRows, RowGrades
from worker.training.objectives._base import TrainingObjective
from worker.training.objectives.causal_lm import CausalLM
from worker.training.rollouts import RolloutPrompt, Rollouts


class DrawnAnswersObjective(CausalLM):
    """Each step draws answers with the weights that it changes. What is drawn follows from the step's number, the seed and the weights: a
    resumed job draws the same answers."""

    balances: ClassVar = False
    draws: ClassVar = True

    def __init__(self, spec: JobSpec, tokenizer: Any) -> None:
        self.plain_template = prepare_tokenizer(tokenizer, spec.run)
        TrainingObjective.__init__(self, spec, tokenizer)
        assert isinstance(spec.preference, DrawnSettings)
        self.drawn, most = spec.preference, spec.preference.answer_tokens
        train_rows, held_rows = batching.sides(spec)
        self.room = spec.model.shape.positions - most - len(self.lead)
        self.prompts = self._prompts_of(train_rows)
        if not self.prompts:
            raise BadData(
                f"None of the {len(train_rows)} rows has a prompt that leaves room for an answer of {most} tokens.",
                hint="Lower answer_tokens, raise the max sequence length, or take rows with prompts.",
            )
        self.left_out = len(train_rows) - len(self.prompts)
        self.train = as_rows(self.prompts, self.lead, most, tokenizer)
        self.graded = self._graded(held_rows)
        self.held_prompts = [RolloutPrompt(row, one) for row, one in self.graded.rows] if self.graded else self._prompts_of(held_rows)
        self.held_prompts = self.held_prompts[: spec.run.graded_rows]
        self.held_rows = [prompt.row for prompt in self.held_prompts]
        self.held_out = as_rows(self.held_prompts, self.lead, 1, tokenizer)
        self.tryout: dict[str, Any] = {}
        self.questions = [prompt.asked for prompt in self.held_prompts[: spec.run.samples]]
        self.newest: RowGrades | None = None  # of the held-out prompts
        self.take_rollouts(nothing_drawn(self.train))

    def _prompts_of(self, rows: Sequence[Row]) -> list[RolloutPrompt]:
        longest = min(self.room, self.spec.run.max_length - self.drawn.answer_tokens)
        kind = self.spec.model.kind
        return [RolloutPrompt(row, one) for row in rows for one in held_out.questions(self.tokenizer, [row], kind, 1, longest)]

    def judging_graders(self) -> list[dict[str, Any]]:
        """The graders of the answers to held-out prompts."""
        return list(self.spec.graders)

    def _graded(self, held_rows: Sequence[Row]) -> GradedRows | None:
        if not held_rows or not (judged := self.judging_graders()):
            return None
        run = self.spec.run.model_copy(update={"sample_tokens": self.drawn.answer_tokens})
        return GradedRows(self.spec.model_copy(update={"graders": tuple(judged), "run": run}), self.tokenizer, held_rows, self.room)

    def remarks(self) -> Iterator[str]:
        yield from super().remarks()
        if self.left_out:
            yield f"{self.left_out} training rows have no prompt that leaves room for an answer, and were excluded."

    @property
    def rows_per_pass(self) -> int:
        return self.drawn.prompts_per_step

    @property
    def answer_limit(self) -> int:
        return self.drawn.answer_tokens

    @property
    def step_rows(self) -> batching.Tokenised:
        return self.rollouts.data

    def take_rollouts(self, rollouts: Rollouts) -> None:
        """The answers of a step become its rows."""
        self.rollouts = rollouts
        self.counts = rollouts.data.trained_counts()
        self.ends = np.cumsum([0, *self.counts])  # places of their tokens among those of the step

    def packs_of_answers(self, budget: int) -> list[list[int]]:
        return best_fit(range(len(self.counts)), self.rollouts.data.lengths, budget)

    def token_places(self, pack: Sequence[int]) -> np.ndarray:
        """Places of the tokens of a pack's answers among those of the step, (K,)."""
        return np.concatenate([np.arange(self.ends[row], self.ends[row + 1]) for row in pack])

    def samples(self, model: Any, state: State, engine: Compute) -> list[events.Sample]:
        """The first answers of the newest validation, with their grades by the first grader."""
        if self.newest is None:
            return super().samples(model, state, engine)
        told = zip(self.questions, state.base_answers, self.newest.answers, self.newest.first, strict=False)
        return [
            events.Sample(prompt=q.text, reference=q.reference, base=base, answer=text or "", score=score) for q, base, text, score in told
        ]

    row_losses, row_losses_before = TrainingObjective.row_losses, TrainingObjective.row_losses_before  # the ledger has none

    def _few_shot_rows(self, most: int) -> None:
        return None


def as_rows(prompts: Sequence[RolloutPrompt], lead: Sequence[int], answer: int, tokenizer: Any) -> batching.Tokenised:
    """Prompts with room for an answer of so many tokens, as rows are planned and counted."""
    pad = tokenizer.pad_token_id or 0
    rows = [np.asarray([*lead, *prompt.asked.ids, *[pad] * answer], np.int32) for prompt in prompts]
    trained = [np.arange(len(row)) >= len(row) - answer for row in rows]
    starts = np.cumsum([0, *map(len, rows)]).astype(np.int64)
    lines = [prompt.row.line for prompt in prompts]
    empty = np.zeros(0, np.int32)
    return batching.Tokenised(np.concatenate([empty, *rows]), np.concatenate([empty.astype(bool), *trained]), starts, lines, 0, [])


def nothing_drawn(data: batching.Tokenised) -> Rollouts:
    """Rows as they are before the first step: no answer has a log-probability or an advantage."""
    rows, tokens = len(data), int(data.trained.sum())
    unknown, zeros = np.full(tokens, np.nan, np.float32), np.zeros(rows, np.float32)
    return Rollouts(data, unknown, zeros, [None] * rows, list(range(rows)), [True] * rows, [""] * rows, [])
