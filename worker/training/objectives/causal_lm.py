"""Generation: the next token of texts and answers is learnt."""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch

from app import events, formats
from app.errors import BadData
from app.jobs import solved_examples
from app.planning.duration import CONTEST_ROWS, contest_tokens
from app.spec import JobSpec
from worker.data import batching
from worker.data.batching import Row, make_batch
from worker.data.chat_template import prepare_tokenizer, template_remark
from worker.modeling import new_tokens, packed_attention, padded
from worker.modeling.cross_entropy import head_of, linear_cross_entropy
from worker.modeling.loading import load_plain
from worker.modeling.router_loss import RouterLoss, router_loss_of
from worker.runtime.device import Compute
from worker.scoring import held_out, prompt_baseline
from worker.scoring.answers import answers, answers_within
from worker.scoring.held_out import HeldOutPrompt
from worker.scoring.metrics import answer_scores, contest, paired_losses
from worker.training import rehearsal
from worker.training.checkpoint import State
from worker.training.graded import GradedRows
from worker.training.objectives._base import MAX_LISTED, MAX_REMEMBERED, EvalResult, Loader, LossOutput, TrainingObjective, remarks_on

ANSWERED = 8
"""Held-out rows that a final evaluation answers in full with the base and with the result."""
ANSWER_SECONDS = 60.0
"""Time limit of all answers of either."""


class Examined(NamedTuple):
    """What a result said: the places of held-out rows that got worst and best, those asked for the scores, all questions, answers,
    and the rows that the base will read behind examples, with the result's losses of their answers."""

    worst: list[int]
    best: list[int]
    asked: list[int]
    questions: dict[int, HeldOutPrompt]
    answers: dict[int, str]
    contest: FewShotRows | None
    losses: list[float]


class FewShotRows(NamedTuple):
    """The same answers twice: after the bare question, and after solved examples and the question. Row i of both is one answer."""

    bare: batching.Tokenised
    shown: batching.Tokenised
    examples: list[solved_examples.SolvedExample]


class CausalLM(TrainingObjective):
    unit: ClassVar = "token"
    excluded: ClassVar = "rows have no trainable tokens left"
    balances: ClassVar = True  # a mixture of experts is trained with its load-balancing loss
    preparing: ClassVar = "Writing the base's answers to general prompts"
    accuracy: ClassVar = "token_accuracy"

    added: new_tokens.AddedTokens | None = None
    router_loss: RouterLoss | None = None  # of a mixture of experts whose routers train; known once the strategy is attached

    def __init__(self, spec: JobSpec, tokenizer: Any) -> None:
        self.plain_template = prepare_tokenizer(tokenizer, spec.run)
        self.added = new_tokens.add_to(tokenizer, spec.run.new_tokens) if spec.run.new_tokens else None
        super().__init__(spec, tokenizer)
        run, kind = spec.run, spec.model.kind
        train_rows, held_rows = batching.sides(spec)
        self.train_rows = train_rows
        self.train = batching.tokenise(tokenizer, train_rows, kind, self.longest, self.lead, run.train_on)
        self.held_out = batching.tokenise(tokenizer, held_rows, kind, self.longest, self.lead, run.train_on)
        if not len(self.train):
            raise BadData(
                f"None of the {len(train_rows)} rows has an answer to train on within {self.longest} tokens.",
                hint="Raise the max sequence length, or check that the rows have assistant turns with weight 1.",
            )
        kept = set(self.held_out.lines)
        self.held_rows = [row for row in held_rows if row.line in kept]
        self.held_bytes = sum(_learnt_bytes(tokenizer, self.held_out, i) for i in range(len(self.held_out)))
        self.tryout = solved_examples.of_rows(train_rows, self.held_rows)
        self.room = spec.model.shape.positions - run.sample_tokens - len(self.lead)
        self.graded = GradedRows(spec, tokenizer, self.held_rows, self.room) if spec.graders else None
        self.questions = held_out.questions(tokenizer, held_rows, kind, run.samples, self.room)

    def remarks(self) -> Iterator[str]:
        yield from remarks_on(self)
        if told := template_remark(self.tokenizer, self.spec.run):
            yield told
        if self.plain_template and formats.get(self.spec.dataset.format).conversations:
            yield "The model has no chat template; it is given a plain one, which is saved with the result."
        if self.added:
            yield (
                f"{len(self.added.pieces)} tokens were added, each as the mean of its pieces. The base is scored with them too, so its loss per token "
                "is not that of a run without them; bits per byte are comparable."
            )

    def load(self, engine: Compute) -> torch.nn.Module:
        spec = self.spec
        model = load_plain(spec.model, engine.frozen, packed_attention.NAME, str(engine.device), type(spec.strategy).base_bits)
        if self.added:
            new_tokens.widen(model, self.added)
        return model

    def prepare(self, model: torch.nn.Module, engine: Compute, attempt: Path, budget: int) -> Generator[float, None, None]:
        """Have the base answer the general prompts that are played in, or read what it wrote before."""
        if self.spec.run.rehearsal_fraction:
            general = yield from rehearsal.general_rows(self.spec, self.tokenizer, model, engine, self.lead, self.longest)
            self.general, self.played = rehearsal.digest_of(general), self.train.with_rows(general)

    def facts(self) -> dict[str, Any]:
        general = {} if self.played is None else {"general": self.general}
        return general | ({"router_loss": self.router_loss.coefficient} if self.router_loss else {})

    def attach(self, model: torch.nn.Module) -> torch.nn.Module:
        attached = self.spec.strategy.attach(model, task=self.spec.task)
        inner = held_out.plain_model(attached)
        self.learned_rows = new_tokens.learn(inner) if self.added else ()
        self.router_loss = router_loss_of(inner) if self.balances and not padded.is_padded(inner) else None
        return attached

    def learnt(self, window: Sequence[Sequence[int]]) -> int:
        return batching.trained_in(self.step_rows, window)

    def batch(self, pack: Sequence[int], engine: Compute) -> Any:
        return make_batch(
            self.step_rows, pack, engine.device, self.frame_of(pack), not self.spec.run.packing, mark=self.router_loss is not None
        )

    def loss(self, model: torch.nn.Module, batch: Any, engine: Compute) -> LossOutput:
        more = {"output_router_logits": True} if self.router_loss else {}
        out = held_out.decoded(model, batch, engine, **more)
        hidden = out.last_hidden_state[0].index_select(0, batch.sources)
        total = linear_cross_entropy(hidden, head_of(held_out.plain_model(model)), batch.targets, engine.compute)
        if self.router_loss:  # of each pack, by its share of the trained tokens
            total = total + batch.trained * self.router_loss.of(out.router_logits, batch.real)
        return LossOutput(total, batch.tokens, batch.trained)

    def validate(self, model: torch.nn.Module, budget: int, engine: Compute) -> Generator[float, None, EvalResult]:
        scored = yield from held_out.scoring(model, self.held_out, budget, engine)
        found = EvalResult(held_out.measures(scored, self.held_bytes), _means(scored)[:MAX_REMEMBERED])
        if self.graded is None:
            return found
        graded = yield from self.graded.measuring(model, engine, self.lead, self.answer)
        return found._replace(metrics=found.metrics | graded.means, graded=graded.first, faults=graded.faults)

    def base_answers(self, model: torch.nn.Module, engine: Compute) -> list[str]:
        return answers(model, self.tokenizer, self.questions, self.answer_limit, engine)

    def samples(self, model: torch.nn.Module, state: State, engine: Compute) -> list[events.Sample]:
        told = state.base_answers
        if state.step:
            told = answers(model, self.tokenizer, self.questions, self.answer_limit, engine, self.lead)
        return [
            events.Sample(prompt=q.text, reference=q.reference, base=base, answer=answer)
            for q, base, answer in zip(self.questions, state.base_answers, told, strict=True)
        ]

    @property
    def answer_limit(self) -> int:
        """Tokens of an answer that is shown or scored, at most."""
        return self.spec.run.sample_tokens

    def kind(self) -> str:
        return formats.get(self.spec.dataset.format).tuned_kind(self.spec.model.kind)

    def row_losses(self, model: torch.nn.Module, budget: int, engine: Compute) -> Generator[float, None, list[float]]:
        return _means((yield from held_out.scoring(model, self.train, budget, engine)))

    def row_losses_before(self, base: Loader, budget: int, engine: Compute) -> Generator[float, None, list[float]]:
        return _means((yield from held_out.scoring(base(), self.train.without(len(self.lead)), budget, engine)))

    def writer(self, model: torch.nn.Module) -> torch.nn.Module | None:
        """None for an encoder–decoder: general texts have no prompt that it could read."""
        return None if self.spec.model.shape.encodes else model

    def examine(self, model: torch.nn.Module, state: State, budget: int, engine: Compute) -> Generator[float, None, Examined]:
        """Answers to some rows and to the rows that changed most. The losses are known from the validations."""
        yield 0.0  # the answers have a limit of their own
        rows = self._few_shot_rows(contest_tokens(state.tokens))
        losses = _means((yield from held_out.scoring(model, rows.bare, budget, engine))) if rows else []
        worst, best = _changed_most(state.base_rows, state.best_rows or state.last_rows)
        asked = self._asked(ANSWERED if self.spec.run.samples else 0)
        questions = self._questions([*asked, *(i for i in [*worst, *best] if i not in asked)] if asked else [])
        return Examined(worst, best, asked, questions, self._answers(model, questions, engine, self.lead), rows, losses)

    def evaluation(self, state: State, examined: Examined, base: Loader, budget: int, engine: Compute) -> dict[str, Any]:
        worst, best, asked, questions, answers, rows, tuned_losses = examined
        before: dict[str, Any] = dict(state.before)
        after: dict[str, Any] = dict(state.best or state.last)
        if not len(self.held_out) or not after:
            return {"tryout": self.tryout}
        told = self._answers(base(), questions, engine, []) if questions else {}
        answered = answer_scores((told, answers), {i: questions[i].reference for i in asked if i in questions})
        for scores, found in zip((before, after), answered.scores, strict=True):
            scores.update(found)
        losses = state.best_rows or state.last_rows
        read = _means(held_out.score_rows(base(), rows.shown, budget, engine)) if rows else []

        def listed(place: int) -> dict[str, Any]:
            question = questions.get(place)
            return {
                "line": self.held_out.lines[place],
                "prompt": question.text if question else self.tokenizer.decode(_row_ids(self.held_out, place, len(self.lead)))[:2000],
                "reference": question.reference if question else None,
                "base_loss": state.base_rows[place],
                "tuned_loss": losses[place],
                "base_answer": told.get(place),
                "tuned_answer": answers.get(place),
            }

        return {
            "tryout": self.tryout | solved_examples.kept(rows.examples if rows else []),
            "rows": len(self.held_out),
            "answers": answered.rows,
            "unanswered": len(asked) - answered.rows,
            "difference": answered.difference,
            "contest": self._contest(state, rows, read, tuned_losses),
            "base": before,
            "tuned": after,
            "worst": [listed(i) for i in worst],
            "best": [listed(i) for i in best],
        }

    def _contest(self, state: State, rows: FewShotRows | None, read: list[float], tuned: list[float]) -> dict[str, Any]:
        """The losses of the result against the base's, and, on `rows`, against those the base `read` behind examples."""
        losses = state.best_rows or state.last_rows
        few_shot = paired_losses(read, tuned, rows.shown.trained_counts()) if rows else None
        over_base = paired_losses(state.base_rows, losses, self.held_out.trained_counts()[: len(losses)])
        return contest("loss", over_base, few_shot, examples=len(rows.examples) if rows else 0)

    def _few_shot_rows(self, most: int) -> FewShotRows | None:
        """Held-out rows for the base to answer behind solved examples, in `most` tokens; None for plain texts."""
        kind, longest = self.spec.model.kind, self.spec.model.shape.positions
        examples = prompt_baseline.examples_of(self.train_rows, kind, self.spec.run.seed)
        asked = prompt_baseline.asked_of(self.held_rows[:CONTEST_ROWS], kind)
        if not examples or not asked:
            return None
        bare = [Row(line, prompt_baseline.last_answer(*one)) for line, one in asked]
        shown = [
            Row(line, prompt_baseline.last_answer(solved_examples.with_examples(one.prompt, examples), one.reference))
            for line, one in asked
        ]
        try:
            both = [batching.tokenise(self.tokenizer, rows, kind, longest, lead) for rows, lead in ((bare, self.lead), (shown, []))]
        except BadData:  # a template that takes no such conversation
            return None
        whole = [set(data.lines) for data in both]
        lines = [line for line, _ in asked if line in whole[0] and line in whole[1]]
        lengths = dict(zip(both[1].lines, both[1].lengths, strict=True))
        total = itertools.accumulate(lengths[line] for line in lines)
        kept = {line for line, tokens in zip(lines, total, strict=True) if tokens <= most}
        if not kept:
            return None
        return FewShotRows(both[0].only(kept), both[1].only(kept), examples)

    def _asked(self, most: int) -> list[int]:
        """The first rows of the held-out ones, which were drawn by the seed."""
        return list(range(min(most, len(self.held_rows), MAX_REMEMBERED)))

    def _questions(self, places: Sequence[int]) -> dict[int, HeldOutPrompt]:
        found = {}
        for place in places:
            one = held_out.questions(self.tokenizer, [self.held_rows[place]], self.spec.model.kind, 1, self.room)
            if one:
                found[place] = one[0]
        return found

    def _answers(self, model: torch.nn.Module, asked: dict[int, HeldOutPrompt], engine: Compute, lead: list[int]) -> dict[int, str]:
        told = answers_within(ANSWER_SECONDS, model, self.tokenizer, list(asked.values()), self.answer_limit, engine, lead)
        return {place: text for place, text in zip(asked, told, strict=True) if text is not None}


def _means(scored: held_out.RowScores) -> list[float]:
    return [nats / tokens for nats, tokens in zip(scored.nats, scored.tokens, strict=True)]


def _changed_most(base: list[float], tuned: list[float]) -> tuple[list[int], list[int]]:
    """(rows whose loss rose most, rows whose loss fell most), no row in both."""
    change = [t - b for b, t in zip(base, tuned, strict=False)]
    order = sorted((i for i in range(len(change)) if math.isfinite(change[i])), key=lambda i: change[i])
    half = min(MAX_LISTED, len(order) // 2)
    return order[::-1][: half or len(order)], order[:half]


def _row_ids(data: batching.Tokenised, row: int, lead: int) -> list[int]:
    return data.ids[data.starts[row] + lead : data.starts[row + 1]].tolist()


def _learnt_bytes(tokenizer: Any, data: batching.Tokenised, row: int) -> int:
    """UTF-8 bytes of what a row teaches."""
    part = slice(data.starts[row], data.starts[row + 1])
    return len(tokenizer.decode(data.ids[part][data.trained[part]].tolist(), skip_special_tokens=True).encode())
