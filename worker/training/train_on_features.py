"""The frozen-features recipe, top to bottom: every text becomes a vector once, and a small classifier learns on the vectors.

It takes seconds to minutes, so it writes no checkpoints: an attempt that was cut off finds the vectors of an earlier one kept
and starts again from there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import nn

from app import events
from app.spec import JobSpec
from app.strategies.feature_extraction import FeatureExtraction
from worker.data.batching import Row
from worker.modeling import fused_layers, packed_attention
from worker.modeling.classifier import Classifier, load_stack, pooling_of
from worker.modeling.loading import load_tokenizer
from worker.runtime import devices
from worker.runtime.device import Compute, choose
from worker.runtime.failures import Diverged
from worker.runtime.progress import ProgressReporter
from worker.scoring import forgetting, prompt_baseline
from worker.scoring.metrics import classification_scores, contest, label_metrics, paired_hits, prior_scores
from worker.training import feature_cache, optim
from worker.training import row_losses as training_row_losses
from worker.training.checkpoint import State, measured, relative, spec_digest
from worker.training.export import export
from worker.training.objectives._base import MAX_REMEMBERED
from worker.training.objectives.classification import (
    answer_in_words,
    evaluation_of,
    label_contest,
    label_remarks,
    read_labelled,
    row_losses,
    tokenise_texts,
)

BATCH_ROWS = 256
"""Rows of a step of the dense classifier."""
FEW_ROWS = 30
"""Fewer held-out rows than these say little; a classifier that is fitted in a moment is then cross-validated over all rows."""
MIN_FOLDED_ROWS = 15
"""Three rows in each of five folds. Groups, and the rows of another dataset, stay on their side and are not folded."""


def train_on_features(spec: JobSpec, folder: Path, control: Any, began: float) -> Iterator[events.TrainerEvent]:
    """As `worker.train.train`, for the strategy `feature_extraction`."""
    strategy, run = spec.strategy, spec.run
    assert isinstance(strategy, FeatureExtraction)
    torch.manual_seed(run.seed)
    engine = choose(run, strategy, {})
    tokenizer = load_tokenizer(spec.model)
    data = read_labelled(spec)
    rows = [*data.train, *data.held_out]
    longest = min(run.max_length, spec.model.shape.positions)
    sized = tokenise_texts(tokenizer, rows, longest)
    yield from (events.Log(level="warn", message=text) for text in _remarks(sized.cut, longest, data.train, data.held_out, data.labels))

    body = strategy.attach(load_stack(spec.model, engine.frozen, packed_attention.NAME, str(engine.device)), task="classification").eval()
    fused_layers.patch_layers(body, engine.device, rotary=False)  # vectors are kept for later jobs, so they are made as ever
    head = strategy.head(spec.model.shape.hidden, len(data.labels))
    # Vectors of length 1, so that one range of strengths serves every model.
    pooling = pooling_of(strategy, spec.model.shape.architecture)
    classifier = Classifier(body, head, pooling, normalise=True, labels=data.labels)
    epochs = 1 if strategy.classifier == "logistic" else strategy.passes
    state = State(facts={**engine.facts(), "spec": spec_digest(spec), "dataset": spec.dataset.sha256})
    yield events.Started(
        device=engine.name,
        precision=engine.precision,
        total_steps=epochs,
        train_rows=len(data.train),
        validation_rows=len(data.held_out),
        train_tokens=int(sized.starts[len(data.train)]),
        trainable_parameters=sum(p.numel() for p in head.parameters()),
        parameters=sum(p.numel() for p in classifier.parameters()),
        seconds_to_load=time.monotonic() - began,
        details={**state.facts, "attention": packed_attention.NAME, "pooling": pooling},
    )
    reading = time.monotonic()
    vectors, tokens_read = yield from _vectors(spec, classifier, tokenizer, rows, longest, engine, control)
    if vectors is None:
        return
    per_second = tokens_read / (time.monotonic() - reading)
    truth, held_truth = data.truth(data.train), data.truth(data.held_out)
    inside, outside = vectors[: len(truth)], vectors[len(truth) :]
    state.tokens = state.trained_tokens = sized.tokens
    state.seconds = time.monotonic() - began
    if len(held_truth):
        prior = prior_scores(truth.tolist(), held_truth.tolist(), data.labels)
        state.before = label_metrics(prior)
        yield events.Evaluated(step=0, loss=prior["log_loss"], metrics=_rest(state.before))
    fitted = None
    if strategy.classifier == "logistic":
        fitted = yield from _fit(classifier, strategy, inside, truth, run.seed, state)
    else:
        yield from _learn(classifier, spec, inside, truth, outside, held_truth, state, control)
    if control.stop and state.step < epochs:
        control.stopped = True
        return

    found = _probabilities(classifier.head, outside)
    evaluation: dict[str, Any] = {}
    if len(held_truth):
        scores = classification_scores(found, held_truth.tolist(), data.labels)
        state.best, state.best_step = label_metrics(scores), state.step
        state.best_rows = row_losses(found, held_truth)[:MAX_REMEMBERED]
        yield events.Evaluated(step=state.step, loss=scores["log_loss"], metrics=_rest(state.best), best=True)
        yield events.Sampled(step=state.step, samples=_samples(found, data.held_out[: run.samples], data.labels))
        evaluation = evaluation_of(found, truth, held_truth, data.held_out, data.labels)
        nearest = _nearest(len(data.labels), run.seed)
        by_examples = nearest(inside, truth, outside[: prompt_baseline.MAX_VECTOR_ROWS])
        evaluation |= {"contest": label_contest(found.argmax(1), truth, held_truth, by_examples), "steps": state.step}
        foldable = spec.validation is None and (spec.split is None or spec.split.method != "grouped")
        if fitted is not None and foldable and len(held_truth) < FEW_ROWS and len(vectors) >= MIN_FOLDED_ROWS:
            everything = np.concatenate([truth, held_truth])
            right = feature_cache.cross_validated(vectors, everything, feature_cache.regression_of(fitted.C), seed=run.seed) == everything
            shown = feature_cache.cross_validated(vectors, everything, nearest, seed=run.seed) == everything
            common = np.bincount(everything).argmax() == everything
            sides = paired_hits(common, right), paired_hits(shown, right)
            evaluation["contest"] |= contest("accuracy", *sides, cross_validated=True)
    if run.row_losses:
        shares = np.bincount(truth, minlength=len(data.labels)) / len(truth)
        parts = [(data.train, inside, truth, False)]
        if spec.validation is None:  # else they are rows of another dataset
            parts.append((data.held_out, outside, held_truth, True))
        training_row_losses.write(
            folder,
            [
                training_row_losses.LossPart(
                    tokenise_texts(tokenizer, rows, longest),
                    (-np.log(shares[labels])).tolist(),
                    row_losses(_probabilities(classifier.head, vectors), labels),
                    held_out,
                )
                for rows, vectors, labels, held_out in parts
                if len(labels)
            ],
        )
    written, revision, adapter = export(folder, spec, classifier, tokenizer, state)
    state.wall_seconds = time.monotonic() - began
    yield events.Finished(
        reason="completed",
        step=state.step,
        path=relative(written.path),
        bytes=written.bytes,
        revision=revision,
        adapter_sha256=adapter,
        kind="classifier",
        best_step=state.best_step,
        labels=data.labels,
        measured=measured(state, engine).model_copy(update={"tokens_per_second": per_second}),
        forgetting=forgetting.without_measuring(spec, len(data.labels)) if run.forgetting else None,
        evaluation=evaluation,
    )


def _nearest(labels: int, seed: int) -> feature_cache.Judge:
    """What a few examples of every label alone would say, without anything learned."""

    def judge(vectors: np.ndarray, truth: np.ndarray, asked: np.ndarray) -> np.ndarray:
        places = prompt_baseline.a_few_of_each(truth, seed)
        return prompt_baseline.nearest_class(vectors[places], truth[places], asked, labels)

    return judge


def _remarks(cut: int, longest: int, train: list[Row], held_out: list[Row], labels: list[str]) -> Iterator[str]:
    if cut:
        yield f"{cut} texts were longer than {longest} tokens and were cut."
    if not held_out:
        yield "No rows are held out, so the classifier is not evaluated on new texts."
    yield from label_remarks(train, labels)


# Vectors --------------------------------------------------------------------------------------------------------------


def _vectors(
    spec: JobSpec, classifier: Classifier, tokenizer: Any, rows: list[Row], longest: int, engine: Compute, control: Any
) -> Generator[events.Log | events.TaskProgress, None, tuple[np.ndarray | None, int]]:
    """The vectors of all rows, kept from before or made now, and the tokens read for them; None when a stop was asked for."""
    texts = [row.row["text"] for row in rows]
    name = feature_cache.cache_name(spec.model, classifier.pooling, longest, engine.rounding)
    known = feature_cache.kept(name, texts)
    new = [text for text in dict.fromkeys(texts) if text not in known]
    if known:
        yield events.Log(message=f"The vectors of {len(known):,} of {len(known) + len(new):,} texts were kept from an earlier job.")
    telling, tokens = ProgressReporter("Turning texts into vectors"), 0
    making = feature_cache.embed(classifier, tokenizer, new, engine, max_length=longest) if new else iter(())
    while True:
        try:
            progress = next(making)
        except StopIteration as done:
            if new:
                feature_cache.keep(name, new, done.value)
                known |= dict(zip(new, done.value, strict=True))
            return np.stack([known[text] for text in texts]), tokens
        tokens = progress.tokens
        if control.stop:
            return None, tokens
        yield from telling.at(progress.done / progress.texts)


# Classifiers ----------------------------------------------------------------------------------------------------------


def _fit(
    classifier: Classifier, strategy: FeatureExtraction, vectors: np.ndarray, truth: np.ndarray, seed: int, state: State
) -> Generator[events.TrainerEvent, None, LogisticRegression]:
    began = time.monotonic()
    fitted, tried = feature_cache.fit_logistic(vectors, truth, strength=strategy.regularisation, seed=seed)
    if tried:
        shown = ", ".join(f"C={c}: {score:.3f}" for c, score in tried.items())
        yield events.Log(message=f"Accuracy in cross-validation: {shown}. C={fitted.C:g} is taken.")
    classifier.head = feature_cache.logistic_head(fitted, len(classifier.labels))
    loss = float(np.mean(row_losses(_probabilities(classifier.head, vectors), truth)))
    state.step, state.seconds = 1, state.seconds + time.monotonic() - began
    yield _step(state, 1.0, loss, 0.0, 0.0)
    return fitted


def _learn(
    classifier: Classifier,
    spec: JobSpec,
    vectors: np.ndarray,
    truth: np.ndarray,
    outside: np.ndarray,
    held_truth: np.ndarray,
    state: State,
    control: Any,
) -> Iterator[events.TrainerEvent]:
    """A small dense network by AdamW, an epoch a step; the epoch that is best on the held-out rows is kept. Raises Diverged."""
    run, head = spec.run, classifier.head
    peak = spec.learning_rate
    optimizer = optim.optimizer_of(dict(head.named_parameters()), spec)
    x, y = torch.from_numpy(vectors), torch.from_numpy(truth)
    assert isinstance(spec.strategy, FeatureExtraction)
    epochs = spec.strategy.passes
    draw = torch.Generator().manual_seed(run.seed)
    best: tuple[float, dict[str, torch.Tensor]] | None = None
    waited = 0
    for epoch in range(1, epochs + 1):
        began, total, norm = time.monotonic(), 0.0, torch.zeros(())
        optim.set_rate(optimizer, optim.learning_rate_at(epoch, epochs, peak, run))
        for part in torch.randperm(len(y), generator=draw).split(BATCH_ROWS):
            loss = F.cross_entropy(head(x[part]), y[part])
            loss.backward()
            norm = optim.clip_grad_norm(dict(head.named_parameters()), run.max_grad_norm)
            optim.optimizer_step(optimizer, norm + loss.detach())
            optimizer.zero_grad(set_to_none=True)
            total += float(loss.detach()) * len(part)
        if not math.isfinite(total):  # nothing was learnt from such a part, and the next epoch would meet it again
            raise Diverged(f"The loss was not a finite number in epoch {epoch}.", hint=f"Lower the learning rate to {peak / 10:.1g}.")
        state.step, state.seconds = epoch, state.seconds + time.monotonic() - began
        yield _step(state, float(epoch), total / len(y), optimizer.param_groups[0]["lr"], float(norm))
        if control.stop:
            return
        if not len(held_truth):
            continue
        held = float(np.mean(row_losses(_probabilities(head, outside), held_truth)))
        if best is None or held < best[0]:
            best, waited = (held, {name: value.clone() for name, value in head.state_dict().items()}), 0
            continue
        waited += 1
        if run.early_stopping_patience and waited >= run.early_stopping_patience:
            break
    if best is not None:
        head.load_state_dict(best[1])


def _step(state: State, epoch: float, loss: float, rate: float, norm: float) -> events.Step:
    return events.Step(
        step=state.step,
        epoch=epoch,
        loss=loss,
        learning_rate=rate,
        grad_norm=norm,
        tokens=state.tokens,
        trained_tokens=state.trained_tokens,
        tokens_per_second=state.tokens / state.seconds if state.seconds else 0.0,
        memory_bytes=devices.CPU.peak_memory(torch.device("cpu")),
        seconds=state.seconds,
    )


@torch.no_grad()
def _probabilities(head: nn.Module, vectors: np.ndarray) -> np.ndarray:
    if not len(vectors):
        return np.empty((0, 0))
    return head(torch.from_numpy(vectors)).softmax(-1).double().numpy()


def _rest(named: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in named.items() if name != "loss"}


def _samples(found: np.ndarray, rows: list[Row], labels: list[str]) -> list[events.Sample]:
    return [
        events.Sample(prompt=row.row["text"], reference=row.row["label"], answer=answer_in_words(found[i], labels))
        for i, row in enumerate(rows)
    ]
