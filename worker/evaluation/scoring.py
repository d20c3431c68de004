"""Shared parts of evaluations: models loaded with their tokenizers, rows selected and scored, and answers generated."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from app.errors import BadData
from app.evaluation.forgetting import TextScore, compare
from app.evaluation.service import MAX_ROW_SCORES, EvaluationSpec
from app.graders import item_of
from app.objectives import OBJECTIVES
from app.run_settings import RunSettings
from app.spec import ModelRef
from app.strategies.lora import Lora
from worker.data import answer_form, batching
from worker.data.batching import Row, Tokenised
from worker.data.chat_template import prepare_tokenizer
from worker.modeling import packed_attention
from worker.modeling.loading import folder_of, load_model, load_strategy, load_tokenizer
from worker.runtime import devices
from worker.runtime.device import Compute, choose
from worker.scoring import held_out
from worker.scoring.answers import answers_within
from worker.scoring.forgetting import Probe, ProbeCache
from worker.scoring.metrics import answer_scores

BUDGET = 2048
"""Tokens of one forward pass."""
ANSWER_SECONDS = 900.0
"""Time limit of one model's answers: somebody waits for an evaluation, and a truncated answer would count as wrong."""
LISTED = 5
"""Number of worst and of best rows listed."""

Say = Callable[[float, str], None]


@dataclass
class Reader:
    """A model to be evaluated: its tokenizer, its virtual tokens, and its weights while they are needed."""

    ref: ModelRef
    engine: Compute
    tokenizer: Any = None
    lead: list[int] = field(default_factory=list)
    _model: torch.nn.Module | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.tokenizer = load_tokenizer(self.ref)
        prepare_tokenizer(self.tokenizer)
        if self.ref.adapters:
            strategy = load_strategy(folder_of(self.ref.adapters[-1].path))
            self.lead = [self.tokenizer.pad_token_id or 0] * strategy.virtual_tokens()

    @contextlib.contextmanager
    def loaded(self) -> Iterator[torch.nn.Module]:
        """The weights, loaded within this context only: two models are never in memory together."""
        self._model = load_model(self.ref, self.engine.frozen, packed_attention.NAME, str(self.engine.device))
        try:
            yield self._model
        finally:
            self._model = None
            gc.collect()

    @property
    def model(self) -> torch.nn.Module:
        """The weights, while they are loaded."""
        assert self._model is not None
        return self._model

    def tokenise(self, rows: Sequence[Row], longest: int) -> Tokenised:
        return batching.tokenise(self.tokenizer, rows, self.ref.kind, min(longest, self.ref.shape.positions), self.lead)

    def probe(self) -> list[TextScore]:
        """The scores of the general probe."""
        probe = Probe(self.tokenizer, self.ref.kind, self.ref.shape.positions, self.lead)
        cache = ProbeCache(self.ref, self.tokenizer, self.engine)
        return cache.read() or cache.keep(probe.score(self.model, BUDGET, self.engine))

    def trained_bytes(self, data: Tokenised) -> list[int]:
        """UTF-8 bytes of each row's tokens with a loss."""
        found = []
        for start, end in zip(data.starts[:-1], data.starts[1:], strict=True):
            ids = data.ids[start:end][data.trained[start:end]].tolist()
            found.append(len(self.tokenizer.decode(ids, skip_special_tokens=True).encode()))
        return found


@dataclass
class ModelScores:
    """One model on the rows: its scores, the loss of each row in nats per token, and its bits per byte, None for a row without any."""

    scores: dict[str, Any]
    losses: list[float]
    bits: list[float | None]
    general: list[TextScore] | None = None


def engine_here() -> Compute:
    """Full precision on a CPU, where it costs little; bf16 on a GPU that supports it."""
    return choose(RunSettings(precision="auto" if devices.gpu() else "fp32"), Lora())


def choose_rows(spec: EvaluationSpec) -> tuple[list[Row], list[Row]]:
    """(rows to score, training rows). The split is the one that training makes; sampling is a function of the seed."""
    rows = batching.read_rows(spec.dataset)
    training: list[Row] = []
    if spec.part == "validation":
        training, held = batching.split(rows, spec.validation_fraction, spec.seed, spec.split)
        rows = held or rows
    if OBJECTIVES[spec.task].classifies and training:
        known = {row.row["label"] for row in training}
        rows = [row for row in rows if row.row["label"] in known]  # a class with validation rows only is still known to the model
    return drawn(rows, spec.rows, spec.seed), training


def drawn(rows: list[Row], most: int, seed: int) -> list[Row]:
    if len(rows) <= most:
        return rows
    return sorted(random.Random(seed).sample(rows, most), key=lambda row: row.line)


# Texts and answers ------------------------------------------------------------------------------------------------------


def write(spec: EvaluationSpec, engine: Compute, say: Say) -> dict[str, Any]:
    """Loss and derived metrics on every row, and answers to some, for the model and its base."""
    rows, _ = choose_rows(spec)
    own = Reader(spec.model, engine)
    readers = [Reader(spec.base, engine), own] if spec.base else [own]
    if spec.base and any(turn.get("tool_calls") for row in rows for turn in row.row.get("messages", ())):
        lend_template(own.tokenizer, readers[0].tokenizer)
    rows, skipped = same_rows(readers, rows, spec.max_length)
    asked = questions(own, rows, range(min(spec.answers, len(rows))), spec.answer_tokens)
    found: list[ModelScores] = []
    answers: list[dict[int, str]] = []
    for place, reader in enumerate(readers):
        say(place / len(readers), f"Reading {len(rows)} rows with {reader.ref.name}")
        with reader.loaded():
            found.append(score(spec, reader, rows, part(say, place, len(readers))))
            say((place + 0.7) / len(readers), f"{reader.ref.name} is answering {len(asked)} rows")
            answers.append(answer(reader, rows, list(asked), spec.answer_tokens))
    worst, best = ends(found)
    more = [place for place in dict.fromkeys([*worst, *best]) if place not in asked]
    asked |= questions(own, rows, more, spec.answer_tokens)
    if spec.answers:
        for reader, told in zip(readers, answers, strict=True):
            say(0.97, "Answering the rows that stand out")
            with reader.loaded():
                told |= answer(reader, rows, more, spec.answer_tokens)
    first = range(min(spec.answers, len(rows)))
    answered = answer_scores(answers, {place: asked[place].reference for place in first if place in asked})
    for one, scores in zip(found, answered.scores, strict=True):
        one.scores |= scores
    graded = []
    if spec.graders:  # graded by the supervisor, which can ask judges
        graded = [_answered(place, rows[place], asked[place], answers) for place in first if all(place in told for told in answers)]
    listed = [_listed(place, rows, asked, found, answers) for place in (*worst, *best)]
    general = [one.general for one in found]
    return {
        "to_grade": graded,
        "row_scores": row_scores("bits_per_byte", rows, found[-1].bits),
        "rows": len(rows),
        "skipped": skipped,
        "answers": answered.rows,
        "unanswered": len(first) - answered.rows,
        "difference": answered.difference,
        "scores": found[-1].scores,
        "base": found[0].scores if spec.base else None,
        "worst": listed[: len(worst)],
        "best": listed[len(worst) :],
        "forgetting": compare(general[0], general[1]).model_dump(mode="json") if len(general) == 2 and general[0] and general[1] else None,
    }


def row_scores(metric: str, rows: Sequence[Row], values: Sequence[float | None]) -> dict[str, Any] | None:
    """The score of each row as `[line, value]`, for comparisons with another model; None for more rows than are kept."""
    if len(rows) > MAX_ROW_SCORES:
        return None
    return {"metric": metric, "rows": [[row.line, value] for row, value in zip(rows, values, strict=True) if value is not None]}


def lend_template(own: Any, base: Any) -> None:
    """Have a base whose chat template writes no tool calls read rows that have some with the template of the model that was made of it."""
    if answer_form.family(base) is None and answer_form.family(own) is not None:
        base.chat_template = own.chat_template


def same_rows(readers: Sequence[Reader], rows: list[Row], longest: int) -> tuple[list[Row], int]:
    """The rows that every model can score, and the number of rows excluded. Raises BadData when none remains."""
    kept = set.intersection(*(set(reader.tokenise(rows, longest).lines) for reader in readers))
    left = [row for row in rows if row.line in kept]
    if not left:
        raise BadData(
            f"None of the {len(rows)} rows has an answer within {longest} tokens.",
            hint="Raise the max sequence length, or take rows with answers.",
        )
    return left, len(rows) - len(left)


def score(spec: EvaluationSpec, reader: Reader, rows: Sequence[Row], say: Say) -> ModelScores:
    """Score the loaded model on every row, and on the general probe where forgetting is measured."""
    data = reader.tokenise(rows, spec.max_length)
    stage = f"Reading {len(rows)} rows with {reader.ref.name}"
    scored = held_out.score_rows(reader.model, data, BUDGET, reader.engine, lambda share: say(0.6 * share, stage))
    losses = [nats / tokens for nats, tokens in zip(scored.nats, scored.tokens, strict=True)]
    general = None
    if spec.forgetting and not reader.ref.shape.encodes:  # general texts have no prompt that an encoder could read
        say(0.6, f"Reading general texts with {reader.ref.name}")
        general = reader.probe()
    sizes = reader.trained_bytes(data)
    bits = [nats / math.log(2) / size if size else None for nats, size in zip(scored.nats, sizes, strict=True)]
    return ModelScores(held_out.measures(scored, sum(sizes)), losses, bits, general)


def part(say: Say, place: int, of: int) -> Say:
    """A progress callback for one of several equal parts."""
    return lambda share, stage: say((place + share) / of, stage)


def questions(reader: Reader, rows: Sequence[Row], places: Sequence[int] | range, most: int) -> dict[int, held_out.HeldOutPrompt]:
    """Rows at some indexes as prompts; those that leave no room for an answer are skipped."""
    room = reader.ref.shape.positions - most - len(reader.lead)
    found = {place: held_out.questions(reader.tokenizer, [rows[place]], reader.ref.kind, 1, room) for place in places}
    return {place: asked[0] for place, asked in found.items() if asked}


def answer(reader: Reader, rows: Sequence[Row], places: Sequence[int], most: int) -> dict[int, str]:
    """The loaded model's greedy answers to the rows at some indexes, with this model's own rendering."""
    asked = questions(reader, rows, places, most)
    told = answers_within(ANSWER_SECONDS, reader.model, reader.tokenizer, list(asked.values()), most, reader.engine, reader.lead)
    return {place: text for place, text in zip(asked, told, strict=True) if text is not None}


def ends(found: Sequence[ModelScores]) -> tuple[list[int], list[int]]:
    """(worst, best) rows: by the increase of their loss over the base's, or by the loss itself where there is no base."""
    last = found[-1].losses
    change = [t - b for b, t in zip(found[0].losses, last, strict=True)] if len(found) == 2 else last
    order = sorted(range(len(change)), key=lambda place: change[place])
    half = min(LISTED, len(order) // 2)
    return order[::-1][: half or len(order)], order[:half]


def _listed(
    place: int,
    rows: Sequence[Row],
    asked: dict[int, held_out.HeldOutPrompt],
    found: Sequence[ModelScores],
    answers: Sequence[dict[int, str]],
) -> dict[str, Any]:
    one, two = asked.get(place), len(found) == 2
    return {
        "line": rows[place].line,
        "prompt": one.text if one else json.dumps(rows[place].row, ensure_ascii=False)[:2000],
        "reference": one.reference if one else None,
        "base_loss": found[0].losses[place] if two else None,
        "tuned_loss": found[-1].losses[place],
        "base_answer": answers[0].get(place) if two else None,
        "tuned_answer": answers[-1].get(place),
    }


def _answered(place: int, row: Row, asked: held_out.HeldOutPrompt, answers: Sequence[dict[int, str]]) -> dict[str, Any]:
    """A row's answers as graders take them (`app.evaluation.grading.measure`)."""
    base = answers[0][place] if len(answers) == 2 else None
    return {"line": row.line, "item": item_of(row.row, asked.text, asked.reference), "base": base, "tuned": answers[-1][place]}


# Classes ----------------------------------------------------------------------------------------------------------------

TEXTS_AT_ONCE = 256


def classify(spec: EvaluationSpec, engine: Compute, say: Say) -> dict[str, Any]:
    """A classifier on labeled rows, compared with always predicting the label shares."""
    from worker.modeling.classifier import load_classifier
    from worker.training.objectives.classification import evaluation_of, probabilities, tokenise_texts

    rows, training = choose_rows(spec)
    say(0.0, f"Loading {spec.model.name}")
    tokenizer = load_tokenizer(spec.model)
    classifier, labels = load_classifier(spec.model, engine.frozen, str(engine.device), packed_attention.NAME)
    known = {label: place for place, label in enumerate(labels)}
    kept = [row for row in rows if row.row["label"] in known]
    if not kept:
        raise BadData(
            f"None of the {len(rows)} rows has a label that {spec.model.name} knows; it knows {', '.join(labels[:5])}.",
            hint="Take a dataset with the same labels.",
        )
    lead = [tokenizer.pad_token_id or 0] * classifier.skip
    longest, found = min(spec.max_length, spec.model.shape.positions), []
    for start in range(0, len(kept), TEXTS_AT_ONCE):
        say(start / len(kept), f"Reading {len(kept)} texts with {spec.model.name}")
        data = tokenise_texts(tokenizer, kept[start : start + TEXTS_AT_ONCE], longest, lead)
        found.append(probabilities(classifier, data, BUDGET, engine))
    truth = np.asarray([known[row.row["label"]] for row in kept])
    seen = [known[row.row["label"]] for row in training if row.row["label"] in known] or truth.tolist()
    every = np.concatenate(found)
    result = evaluation_of(every, np.asarray(seen), truth, kept, labels)
    result["scores"] = result.pop("tuned")
    result["row_scores"] = row_scores("accuracy", kept, (every.argmax(1) == truth).astype(float).tolist())
    return {**result, "skipped": len(rows) - len(kept), "answers": 0, "forgetting": None}
