"""Classification by gradient: texts packed side by side, each pooled to a vector, and cross-entropy on its class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F

from app import events
from app.errors import BadData
from app.planning.duration import EXAMPLES_A_CLASS
from app.spec import MAX_CLASSES, JobSpec
from worker.data import batching
from worker.data.batching import BadRow, Row, Tokenised
from worker.modeling import packed_attention
from worker.modeling.classifier import Classifier, ScoredBackbone, load_stack, output_layer, pooling_of, render_text
from worker.runtime.device import Compute
from worker.runtime.progress import drained
from worker.runtime.transfer import sent
from worker.scoring import prompt_baseline
from worker.scoring.held_out import reading
from worker.scoring.metrics import classification_scores, contest, label_metrics, paired_hits, prior_scores
from worker.training.checkpoint import State
from worker.training.objectives._base import (
    MAX_LISTED,
    MAX_REMEMBERED,
    EvalResult,
    Loader,
    LossOutput,
    TrainingObjective,
    body_of,
    remarks_on,
)


class Labelled(NamedTuple):
    """The rows of an order for classification, by side, with the labels in their order."""

    train: list[Row]
    held_out: list[Row]
    labels: list[str]

    def truth(self, rows: Sequence[Row]) -> np.ndarray:
        place = {label: i for i, label in enumerate(self.labels)}
        return np.asarray([place[row.row["label"]] for row in rows], np.int64)


def read_labelled(spec: JobSpec) -> Labelled:
    """Rows and labels. Labels stand in the order of their names, whole numbers by value, whatever the order of the rows.

    Raises BadRow for an empty text or a label that only the validation rows have, BadData when there is one class only.
    """
    rows = batching.read_rows(spec.dataset)
    _check(rows)
    labels = sorted({row.row["label"] for row in rows}, key=_label_order)
    if len(labels) < 2:
        raise BadData(
            f"All {len(rows)} rows have the label “{labels[0]}”, so there is nothing to tell apart.",
            hint="Add rows of another class, or check which column holds the label.",
        )
    if len(labels) > MAX_CLASSES:
        raise BadData(
            f"The rows have {len(labels)} different labels; a classifier learns at most {MAX_CLASSES}.",
            hint="Check which column holds the label: one that names every row is none.",
        )
    if spec.validation is None:
        train, held_out = _split(rows, spec)
        return Labelled(batching.share(train, spec.run.data_fraction, spec.run.seed), held_out, labels)
    held_out = batching.read_rows(spec.validation)
    _check(held_out)
    for line, row in held_out:
        if row["label"] not in labels:
            unseen = BadData(
                f"The validation row has the label “{row['label']}”, which no training row has.",
                hint="Add training rows of this class, or fix the label in the validation file.",
            )
            raise BadRow(line, unseen)
    return Labelled(batching.share(rows, spec.run.data_fraction, spec.run.seed), held_out, labels)


def _check(rows: Sequence[Row]) -> None:
    for line, row in rows:
        if not isinstance(row.get("text"), str) or not isinstance(row.get("label"), str):
            raise BadRow(line, BadData(f"The row has the keys {', '.join(sorted(row))}.", hint="Use rows with a text and a label."))
        for key in ("text", "label"):
            if not row[key].strip():
                raise BadRow(line, BadData(f"The row's {key} is empty.", hint="Drop the row, or fill it in."))


def _label_order(label: str) -> tuple[int, float, str]:
    return (0, float(label), label) if label.lstrip("-").isascii() and label.lstrip("-").isdigit() else (1, 0.0, label)


def _split(rows: list[Row], spec: JobSpec) -> tuple[list[Row], list[Row]]:
    """As for every task, but a class whose rows were all held out keeps them for training: it could not be learnt else."""
    train, held_out = batching.split(rows, spec.run.validation_fraction, spec.run.seed, spec.split)
    known = {row.row["label"] for row in train}
    back = [row for row in held_out if row.row["label"] not in known]
    return train + back, [row for row in held_out if row.row["label"] in known]


def tokenise_texts(tokenizer: Any, rows: Sequence[Row], longest: int, lead: Sequence[int] = ()) -> Tokenised:
    """Every text once, framed as the tokenizer frames one, with the placeholders of `lead` before it."""
    if longest - len(lead) < 4:
        raise BadData(
            f"The model reads {longest} tokens at once, and {len(lead)} trained ones are put before each text: no room is left.",
            hint="Choose fewer trained tokens, or a longer length.",
        )
    pieces, starts, cut = [], [0], 0
    for line, row in rows:
        ids, was_cut = render_text(tokenizer, row["text"], longest - len(lead))
        if not ids:
            raise BadRow(line, BadData("The model's tokenizer makes nothing of this text.", hint="Drop the row."))
        pieces.append(np.asarray([*lead, *ids], np.int32))
        starts.append(starts[-1] + len(pieces[-1]))
        cut += was_cut
    flat = np.concatenate(pieces) if pieces else np.zeros(0, np.int32)
    return Tokenised(flat, np.zeros(len(flat), bool), np.asarray(starts, np.int64), [row.line for row in rows], cut, [])


def pack_of(
    data: Tokenised, rows: Sequence[int], device: torch.device, frame: packed_attention.PackShape | None = None
) -> tuple[dict[str, Any], list[int]]:
    """A classifier's inputs for some texts, packed, and the texts' lengths."""
    spans = [slice(data.starts[r], data.starts[r + 1]) for r in rows]
    lengths = [int(s.stop - s.start) for s in spans]
    return packed_attention.packed(np.concatenate([data.ids[s] for s in spans]), lengths, device, frame), lengths


def sorting(model: Classifier, data: Tokenised, budget: int, engine: Compute) -> Generator[float, None, np.ndarray]:
    """Probabilities, (rows, labels), of all texts of `data` in their order; says the share of the packs that are done."""
    found = np.empty((len(data), len(model.labels)), np.float64)

    def read(pack: Sequence[int]) -> None:
        inputs, lengths = pack_of(data, pack, engine.device)
        with engine.autocast():
            scores = model(**inputs, lengths=lengths)
        found[pack] = scores.float().softmax(-1).cpu().numpy()

    yield from reading(model, read, data.lengths, budget, engine)
    return found


def probabilities(model: Classifier, data: Tokenised, budget: int, engine: Compute) -> np.ndarray:
    """The same in one go."""
    return drained(sorting(model, data, budget, engine))


class SequenceClassification(TrainingObjective):
    unit: ClassVar = "text"
    reads: str = ""  # as `Classifier.reads`

    def __init__(self, spec: JobSpec, tokenizer: Any) -> None:
        super().__init__(spec, tokenizer)
        data = read_labelled(spec)
        self.labels = data.labels
        self.train_rows, self.held_rows = data.train, data.held_out
        self.train = tokenise_texts(tokenizer, data.train, self.longest, self.lead)
        self.held_out = tokenise_texts(tokenizer, data.held_out, self.longest, self.lead)
        self.train_truth, self.held_truth = data.truth(data.train), data.truth(data.held_out)
        self.newest: np.ndarray | None = None  # what the last validation said, (rows, labels)

    def remarks(self) -> Iterator[str]:
        yield from remarks_on(self)
        yield from label_remarks(self.train_rows, self.labels or [])

    def load(self, engine: Compute) -> torch.nn.Module:
        return load_stack(self.spec.model, engine.frozen, packed_attention.NAME, str(engine.device), type(self.spec.strategy).base_bits)

    def attach(self, model: torch.nn.Module) -> Classifier:
        strategy, shape, labels = self.spec.strategy, self.spec.model.shape, self.labels or []
        body = strategy.attach(model, task=self.spec.task, labels=len(labels))
        head = strategy.head(shape.hidden, len(labels)).to(next(model.parameters()).device)
        pooling = pooling_of(strategy, shape.architecture)
        return Classifier(body, head, pooling, skip=strategy.virtual_tokens(), labels=labels, reads=self.reads)

    def learnt(self, window: Sequence[Sequence[int]]) -> int:
        return sum(len(pack) for pack in window)

    def batch(self, pack: Sequence[int], engine: Compute) -> Any:
        truth = sent(torch.from_numpy(self.train_truth[list(pack)]), engine.device)
        return *pack_of(self.train, pack, engine.device, self.frame_of(pack)), truth

    def loss(self, model: torch.nn.Module, batch: Any, engine: Compute) -> LossOutput:
        inputs, lengths, truth = batch
        with engine.autocast():
            scores = model(**inputs, lengths=lengths)
        return LossOutput(F.cross_entropy(scores.float(), truth, reduction="sum"), sum(lengths), len(lengths))

    def validate(self, model: torch.nn.Module, budget: int, engine: Compute) -> Generator[float, None, EvalResult]:
        self.newest = yield from sorting(cast("Classifier", model), self.held_out, budget, engine)
        found = classification_scores(self.newest, self.held_truth, self.labels or [])
        rows = row_losses(self.newest, self.held_truth)
        return EvalResult(label_metrics(found), rows[:MAX_REMEMBERED])

    def samples(self, model: torch.nn.Module, state: State, engine: Compute) -> list[events.Sample]:
        """The first held-out texts with the likeliest label and its probability, from the validation that was just made."""
        if self.newest is None or not len(self.newest):
            return []
        return [
            events.Sample(prompt=row.row["text"], reference=row.row["label"], answer=answer_in_words(self.newest[i], self.labels or []))
            for i, row in enumerate(self.held_rows[: self.spec.run.samples])
        ]

    def kind(self) -> str:
        return "classifier"

    # At the end -----------------------------------------------------------------------------------------------------------

    def row_losses(self, model: torch.nn.Module, budget: int, engine: Compute) -> Generator[float, None, list[float]]:
        return row_losses((yield from sorting(cast("Classifier", model), self.train, budget, engine)), self.train_truth)

    def row_losses_before(self, base: Loader, budget: int, engine: Compute) -> Generator[float, None, list[float]]:
        """Of always answering with the shares of the labels: before tuning there is no classifier."""
        yield from ()
        shares = np.bincount(self.train_truth, minlength=len(self.labels or [])) / len(self.train_truth)
        return (-np.log(shares[self.train_truth])).tolist()

    def writer(self, model: torch.nn.Module) -> torch.nn.Module | None:
        """A decoder's stack under the output layer that the model came with."""
        return ScoredBackbone(body_of(model), output_layer(self.spec.model, model))

    def examine(self, model: torch.nn.Module, state: State, budget: int, engine: Compute) -> Generator[float, None, np.ndarray]:
        return (yield from sorting(cast("Classifier", model), self.held_out, budget, engine))

    def evaluation(self, state: State, examined: np.ndarray, base: Loader, budget: int, engine: Compute) -> dict[str, Any]:
        """Beside always answering with the shares of the training labels, as no model answers with labels before tuning."""
        if not len(self.held_out):
            return {}
        found = evaluation_of(examined, self.train_truth, self.held_truth, self.held_rows, self.labels or [])
        return found | {"contest": label_contest(examined.argmax(1), self.train_truth, self.held_truth, self._nearest(base, engine))}

    def _nearest(self, base: Loader, engine: Compute) -> np.ndarray:
        """What the base's vectors alone answer for the first held-out texts, (rows,): the label whose examples lie nearest."""
        from worker.training.feature_cache import embed  # scikit-learn stands behind it

        places = prompt_baseline.a_few_of_each(self.train_truth, self.spec.run.seed)
        asked = self.held_rows[: prompt_baseline.MAX_VECTOR_ROWS]
        texts = [row.row["text"] for row in (*(self.train_rows[i] for i in places), *asked)]
        reader = Classifier(base(), torch.nn.Identity(), "mean", normalise=True)
        vectors = drained(embed(reader, self.tokenizer, texts, engine, max_length=self.longest))  # type: ignore[arg-type]
        return prompt_baseline.nearest_class(
            vectors[: len(places)], self.train_truth[places], vectors[len(places) :], len(self.labels or [])
        )


def label_remarks(rows: Sequence[Row], labels: Sequence[str]) -> Iterator[str]:
    counts = Counter(row.row["label"] for row in rows)
    lone = [label for label in labels if counts[label] == 1]
    if lone:
        shown = ", ".join(f"“{label}”" for label in lone[:5]) + (", …" if len(lone) > 5 else "")
        yield f"{'1 class has' if len(lone) == 1 else f'{len(lone)} classes have'} only one training row: {shown}. Add rows of it, or the model will rarely predict it."
    numbers = sum(_label_order(label)[0] == 0 for label in labels)
    if 0 < numbers < len(labels):
        yield f"{numbers} of the {len(labels)} labels are numbers and the others are words; check that they mean what they should."


def label_contest(
    answers: np.ndarray, train_truth: np.ndarray, truth: np.ndarray, nearest: np.ndarray, examples: int = EXAMPLES_A_CLASS
) -> dict[str, Any]:
    """A classifier's answers, (rows,), against the commonest label, and against what the base's vectors answer for the first rows."""
    right = answers == truth
    common = np.bincount(train_truth).argmax() == truth
    few = len(nearest)
    few_shot = paired_hits(nearest == truth[:few], right[:few]) if few else None
    return contest("accuracy", paired_hits(common, right), few_shot, examples=examples, few_shot_by="vectors")


def row_losses(found: np.ndarray, truth: np.ndarray) -> list[float]:
    """Log loss of each row, in nats."""
    return (-np.log(np.clip(found[np.arange(len(truth)), truth], 1e-12, None))).tolist()


def answer_in_words(probabilities: np.ndarray, labels: Sequence[str]) -> str:
    best = int(probabilities.argmax())
    return f"{labels[best]} ({probabilities[best]:.0%})"


def evaluation_of(
    found: np.ndarray, train_truth: np.ndarray, truth: np.ndarray, rows: Sequence[Row], labels: Sequence[str]
) -> dict[str, Any]:
    """The evaluation of a classifier: scores of the prior and of the result, and its worst and best rows by loss."""
    base, tuned = prior_scores(train_truth.tolist(), truth.tolist(), labels), classification_scores(found, truth.tolist(), labels)
    for scores in (base, tuned):
        scores["loss"] = scores["log_loss"]
    for name in ("per_class", "confusion", "labels", "reliability"):
        base.pop(name)  # the prior's are of no interest
    losses = row_losses(found, truth)
    order = sorted(range(len(losses)), key=lambda i: losses[i], reverse=True)

    def listed(i: int) -> dict[str, Any]:
        best = int(found[i].argmax())
        return {
            "line": rows[i].line,
            "prompt": rows[i].row["text"],
            "reference": rows[i].row["label"],
            "tuned_answer": labels[best],
            "probability": float(found[i, best]),
            "tuned_loss": losses[i],
        }

    half = min(MAX_LISTED, max(1, len(order) // 2))
    best = [listed(i) for i in order[::-1][:half]]
    return {"rows": len(truth), "base": base, "tuned": tuned, "worst": [listed(i) for i in order[:half]], "best": best}
