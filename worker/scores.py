"""What an evaluation says of a classifier: how often it is right, where it errs, and whether its probabilities can be believed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

CALIBRATION_BINS = 10
MOST_DRAWN = 200
"""Labels up to which the confusion matrix is told."""


def classification_scores(probabilities: np.ndarray, truth: Sequence[int], labels: Sequence[str]) -> dict[str, Any]:
    """Scores of probabilities (rows, labels) against the right label's number for each row.

    `accuracy`, `macro_f1`, `log_loss` (nats a row), `calibration_error` (expected calibration error over ten equal bins of
    confidence, Guo et al. 2017), `per_class` (precision, recall, f1 and rows by label), `confusion` (rows of the truth,
    columns of the answer, empty above MOST_DRAWN labels) and `reliability` (for each bin: confidence, accuracy, rows).
    """
    from sklearn.metrics import confusion_matrix, f1_score, precision_recall_fscore_support  # slow to import, needed at the end

    right = np.asarray(truth)
    answer = probabilities.argmax(1)
    every = np.arange(len(labels))
    precision, recall, f1, support = precision_recall_fscore_support(right, answer, labels=every, zero_division=0)
    present = np.unique(right)
    picked = np.clip(probabilities[np.arange(len(right)), right], 1e-12, None)
    error, bins = calibration(probabilities.max(1), answer == right)
    return {
        "rows": len(right),
        "accuracy": float((answer == right).mean()),
        "macro_f1": float(f1_score(right, answer, labels=present, average="macro", zero_division=0)),
        "log_loss": float(-np.log(picked).mean()),
        "calibration_error": error,
        "reliability": bins,
        "per_class": {
            label: {"precision": float(p), "recall": float(r), "f1": float(f), "rows": int(n)}
            for label, p, r, f, n in zip(labels, precision, recall, f1, support, strict=True)
        },
        "labels": list(labels),
        # Its size is the square of the number of labels, and nobody reads a picture of more than these.
        "confusion": confusion_matrix(right, answer, labels=every).tolist() if len(labels) <= MOST_DRAWN else [],
    }


def calibration(confidence: np.ndarray, hit: np.ndarray) -> tuple[float, list[dict[str, float]]]:
    """The expected calibration error and its bins: how far the stated confidence lies from the share of right answers."""
    place = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    bins, error = [], 0.0
    for i in range(CALIBRATION_BINS):
        inside = place == i
        rows = int(inside.sum())
        if rows == 0:
            continue
        stated, true = float(confidence[inside].mean()), float(hit[inside].mean())
        bins.append({"confidence": stated, "accuracy": true, "rows": rows})
        error += rows / len(confidence) * abs(stated - true)
    return error, bins


def prior_scores(train: Sequence[int], truth: Sequence[int], labels: Sequence[str]) -> dict[str, Any]:
    """The scores of always answering with the shares of the training rows: what any classifier has to beat."""
    shares = np.bincount(np.asarray(train), minlength=len(labels)) / max(len(train), 1)
    return classification_scores(np.tile(shares, (len(truth), 1)), truth, labels)


# Texts ----------------------------------------------------------------------------------------------------------------


def text_scores(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Exact match, ROUGE-L and chrF (Popović 2015), each 0 to 1 and the mean over the rows; empty without rows."""
    if not answers:
        return {}
    from sacrebleu.metrics import CHRF

    pairs = list(zip(answers, references, strict=True))
    chrf = CHRF()
    return {
        "exact_match": sum(a.strip() == r.strip() for a, r in pairs) / len(pairs),
        "rouge_l": sum(rouge_l(a, r) for a, r in pairs) / len(pairs),
        "chrf": sum(chrf.sentence_score(a, [r]).score for a, r in pairs) / len(pairs) / 100,
    }


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L (Lin 2004): F1 of the longest common subsequence of lower-case words, 0 to 1."""
    a, r = (re.findall(r"\w+", text.lower()) for text in (answer, reference))
    if not a or not r:
        return float(a == r)
    above = [0] * (len(r) + 1)  # lengths of the common subsequence of the words so far and each beginning of `r`
    for word in a:
        row = [0]
        for place, other in enumerate(r):
            row.append(above[place] + 1 if word == other else max(above[place + 1], row[place]))
        above = row
    common = above[-1]
    return 2 * common / (len(a) + len(r))
