"""Vectors of frozen features, and the small classifier trained on them. The recipe is `worker/training/train_on_features.py`.

Vectors are kept under `features/`, each by what it depends on (model, text, length, pooling, precision), so a comparison of
classifiers on the same data computes none a second time, and a job on more data only those of the new texts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold, StratifiedKFold, cross_val_score
from torch import nn

from app.planning.memory import EMBEDDED_TOKENS
from app.settings import get_settings
from app.spec import ModelRef
from worker.modeling.classifier import Classifier, Pooling, render_text
from worker.modeling.packed_attention import packed
from worker.runtime.device import Compute

log = logging.getLogger(__name__)
STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Inverse strengths C that cross-validation tries."""
FOLD_ROWS = 3000
"""Cross-validation looks at this many rows at most: choosing C needs no more, and its time grows with each."""


class FeatureProgress(NamedTuple):
    """Different texts done, of how many, and their tokens."""

    done: int
    texts: int
    tokens: int


def embed(
    classifier: Classifier, tokenizer: Any, texts: Sequence[str], engine: Compute, *, max_length: int
) -> Generator[FeatureProgress, None, np.ndarray]:
    """One float32 vector per text, (texts, H), in their order. Texts of like length share a batch, packed without padding; on a CPU
    several batches are computed side by side.

    Equal texts are computed once. Says how far it is after every round; the vectors are what the generator returns.
    """
    unique = list(dict.fromkeys(texts))
    ids = [render_text(tokenizer, text, max_length)[0] or [tokenizer.eos_token_id or 0] for text in unique]
    order = sorted(range(len(unique)), key=lambda i: len(ids[i]))
    vectors: np.ndarray | None = None
    done = tokens = 0

    def read(batch: list[int]) -> np.ndarray:
        return _embed_batch(classifier, [ids[i] for i in batch], engine)

    parts = engine.parts(EMBEDDED_TOKENS)
    batches = _batches(order, ids, EMBEDDED_TOKENS // parts)
    for start in range(0, len(batches), parts):
        round_ = batches[start : start + parts]
        for batch, found in zip(round_, engine.abreast.map(read, round_), strict=True):
            if vectors is None:
                vectors = np.empty((len(unique), found.shape[1]), np.float32)
            vectors[batch] = found
            done, tokens = done + len(batch), tokens + sum(len(ids[i]) for i in batch)
        yield FeatureProgress(done, len(unique), tokens)
    assert vectors is not None, "there is a text"
    place = {text: i for i, text in enumerate(unique)}
    return vectors[[place[text] for text in texts]]


def _batches(order: Sequence[int], ids: Sequence[Sequence[int]], budget: int) -> list[list[int]]:
    batches: list[list[int]] = [[]]
    held = 0
    for i in order:
        if batches[-1] and held + len(ids[i]) > budget:
            batches.append([])
            held = 0
        batches[-1].append(i)
        held += len(ids[i])
    return batches


@torch.inference_mode()
def _embed_batch(classifier: Classifier, ids: list[list[int]], engine: Compute) -> np.ndarray:
    lengths = [len(x) for x in ids]
    inputs = packed([token for text in ids for token in text], lengths, engine.device)
    with engine.autocast():
        return classifier.pooled(**inputs, lengths=lengths).float().cpu().numpy()


def cache_name(ref: ModelRef, pooling: Pooling, max_length: int, rounding: str) -> str:
    """A SHA-256 over all that the vector of a text depends on, but for the text."""
    about = [ref.revision, [a.sha256 for a in ref.adapters], pooling, max_length, rounding]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:40]


def kept(name: str, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """The vectors, (H,), of those texts that were kept under a name, by any job."""
    wanted = {_digest(text): text for text in texts}
    found: dict[str, np.ndarray] = {}
    for path in sorted(get_settings().folder("features").glob(f"{name}-*.safetensors")):
        held = load_file(path)
        for digest, vector in zip(held["texts"], held["vectors"], strict=True):
            if (text := wanted.get(digest.tobytes())) is not None:
                found[text] = vector
    return found


def keep(name: str, texts: Sequence[str], vectors: np.ndarray) -> None:
    """Write the vectors, (texts, H), of different texts beside those that are kept, whole or not at all: where the disk is
    full, the next job makes them anew."""
    folder = get_settings().folder("features")
    digests = np.frombuffer(b"".join(map(_digest, texts)), np.uint8).reshape(len(texts), -1)
    file = f"{name}-{hashlib.sha256(digests.tobytes()).hexdigest()[:16]}.safetensors"
    try:
        with tempfile.TemporaryDirectory(dir=folder, suffix=".part") as own:
            save_file({"texts": digests, "vectors": np.ascontiguousarray(vectors)}, f"{own}/vectors")
            Path(own, "vectors").replace(folder / file)
    except (OSError, SafetensorError) as error:
        log.warning("The vectors of these texts are not kept: %s", error)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


# Classifiers ----------------------------------------------------------------------------------------------------------


def fit_logistic(
    vectors: np.ndarray, truth: np.ndarray, *, strength: float | None, seed: int
) -> tuple[LogisticRegression, dict[str, float]]:
    """Multinomial logistic regression on vectors (rows, H), and the mean held-out accuracy of every strength that was tried.

    Without a given `strength` C is chosen by stratified cross-validation in three folds (two where a class is that small).
    """
    tried: dict[str, float] = {}
    if strength is None:
        tried = _try_strengths(vectors, truth, seed)
        strength = float(max(tried, key=lambda c: tried[c])) if tried else 10.0
    model = LogisticRegression(C=strength, max_iter=2000)
    return model.fit(vectors, truth), tried


Judge = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""Learns from vectors, (rows, H), and their classes, (rows,), and says the class of each of other vectors."""


def cross_validated(vectors: np.ndarray, truth: np.ndarray, judge: Judge, *, seed: int) -> np.ndarray:
    """What `judge` says of each row, (rows,), having learned from the other folds of five: every row is held out once."""
    kind = StratifiedKFold if np.bincount(truth).max() >= 5 else KFold
    said = np.empty_like(truth)
    for train, held_out in kind(5, shuffle=True, random_state=seed).split(vectors, truth):
        said[held_out] = judge(vectors[train], truth[train], vectors[held_out])
    return said


def regression_of(strength: float) -> Judge:
    def judge(vectors: np.ndarray, truth: np.ndarray, asked: np.ndarray) -> np.ndarray:
        if len(np.unique(truth)) == 1:
            return np.full(len(asked), truth[0])
        return np.asarray(LogisticRegression(C=strength, max_iter=1000, tol=5e-4).fit(vectors, truth).predict(asked))

    return judge


def _try_strengths(vectors: np.ndarray, truth: np.ndarray, seed: int) -> dict[str, float]:
    chosen = np.random.default_rng(seed).permutation(len(truth))[:FOLD_ROWS]
    x, y = vectors[chosen], truth[chosen]
    counts = np.bincount(y)
    x, y = x[counts[y] >= 2], y[counts[y] >= 2]  # a class with one row can be in one fold only
    if len(np.unique(y)) < 2:
        return {}
    folds = StratifiedKFold(min(3, int(np.bincount(y)[np.unique(y)].min())), shuffle=True, random_state=seed)
    # Which C is best shows long before the last digit of the weights does.
    found = {c: cross_val_score(LogisticRegression(C=c, max_iter=1000, tol=5e-4), x, y, cv=folds).mean() for c in STRENGTHS}
    return {str(c): float(score) for c, score in found.items()}


def logistic_head(model: LogisticRegression, labels: int) -> nn.Linear:
    """The regression as a linear layer, (H) → (labels); softmax of its scores are the regression's probabilities.

    With two classes scikit-learn keeps one row of weights, for the second class; the first then scores zero.
    """
    weight, bias = np.atleast_2d(model.coef_), np.atleast_1d(model.intercept_)
    head = nn.Linear(weight.shape[1], labels)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.fill_(-1e4 if len(model.classes_) < labels else 0.0)  # a class without a training row is never answered
        rows = model.classes_[1:] if len(model.classes_) == 2 else model.classes_
        head.bias[torch.from_numpy(model.classes_)] = 0.0
        for row, w, b in zip(rows, weight, bias, strict=True):
            head.weight[row] = torch.from_numpy(w).float()
            head.bias[row] = float(b)
    return head
