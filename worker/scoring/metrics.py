"""Metrics of classifiers and of generated answers, with confidence intervals and paired comparisons."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from app.kit import similarity, stats
from app.metrics import METRICS

CALIBRATION_BINS = 10
MAX_DRAWN = 200
"""Labels up to which the confusion matrix is returned."""


def classification_scores(probabilities: np.ndarray, truth: Sequence[int] | np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
    """Metrics of probabilities (rows, labels) against the index of the right label of each row.

    `accuracy`, `macro_f1`, `log_loss` (nats per row), `calibration_error` (expected calibration error over ten equal bins of
    confidence, Guo et al. 2017, https://arxiv.org/abs/1706.04599), `per_class` (precision, recall, f1 and rows by label),
    `confusion` (rows: true label, columns: predicted; empty above MAX_DRAWN labels) and `reliability` (for each bin: confidence,
    accuracy, rows).
    """
    from sklearn.metrics import confusion_matrix, f1_score, precision_recall_fscore_support  # slow to import, and needed only at the end

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
        # Its size is the square of the number of labels, and nobody reads a plot of more than these.
        "confusion": confusion_matrix(right, answer, labels=every).tolist() if len(labels) <= MAX_DRAWN else [],
    }


def calibration(confidence: np.ndarray, hit: np.ndarray) -> tuple[float, list[dict[str, float]]]:
    """The expected calibration error and its bins: the distance between stated confidence and accuracy."""
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


def label_metrics(scores: dict[str, Any]) -> dict[str, float]:
    """Of `classification_scores` what an evaluation's event carries: the metrics, the log loss as the loss."""
    return {"loss": scores["log_loss"], **{name: scores[name] for name in METRICS if name in scores and name not in ("loss", "log_loss")}}


def prior_scores(train: Sequence[int], truth: Sequence[int], labels: Sequence[str]) -> dict[str, Any]:
    """The metrics of always predicting the label shares of the training rows: the baseline of any classifier."""
    shares = np.bincount(np.asarray(train), minlength=len(labels)) / max(len(train), 1)
    return classification_scores(np.tile(shares, (len(truth), 1)), truth, labels)


# Two models on the same rows ------------------------------------------------------------------------------------------


def paired_losses(one: Sequence[float], other: Sequence[float], weights: Sequence[float] | None = None) -> dict[str, Any]:
    """Mean losses of two models on the same rows, `one` and `other`, and `interval`: the 95 % interval of other − one by a paired
    Student's t. `weights` are token counts where the losses are means over a row's tokens, so that the means are over all tokens."""
    from scipy.stats import t  # comes with scikit-learn and is slow to import

    share = np.ones(len(one)) if weights is None else np.asarray(weights, float) / np.mean(weights)
    a, b = np.asarray(one, float) * share, np.asarray(other, float) * share
    change = b - a
    half = float(t.ppf(0.975, len(change) - 1) * change.std(ddof=1) / math.sqrt(len(change))) if len(change) > 1 else math.inf
    middle = float(change.mean())
    return {"rows": len(one), "one": float(a.mean()), "other": float(b.mean()), "interval": (middle - half, middle + half)}


def paired_hits(one: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """The same for correctness, (rows,) of bool: both accuracies, and the 95 % interval of their difference."""
    a, b = one.astype(bool), other.astype(bool)
    interval = stats.paired_shares(int((a & b).sum()), int((b & ~a).sum()), int((a & ~b).sum()), int((~a & ~b).sum()))
    return {"rows": len(a), "one": float(a.mean()), "other": float(b.mean()), "interval": interval}


def contest(metric: str, base: Mapping[str, Any] | None, few_shot: Mapping[str, Any] | None = None, **facts: Any) -> dict[str, Any]:
    """The inputs of a job's verdict (app/evaluation/verdict.py): the fine-tuned model against its base and, where there is one,
    against the base with few-shot examples. `base` and `few_shot` are `paired_…` of that model and the fine-tuned one."""
    return {"metric": metric, "base": _side(base), "few_shot": _side(few_shot), **facts}


def _side(paired: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if paired is None or not paired["rows"]:
        return None
    low, high = paired["interval"]
    told = math.isfinite(low) and math.isfinite(high)
    return {"rows": paired["rows"], "score": paired["one"], "tuned": paired["other"], "interval": [low, high] if told else None}


# Texts ----------------------------------------------------------------------------------------------------------------


def text_scores(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Exact match, ROUGE-L and chrF (Popović 2015), each 0 to 1 and the mean over the rows; empty without rows."""
    return {name: float(values.mean()) for name, values in row_scores(answers, references).items()}


def row_scores(answers: Sequence[str], references: Sequence[str]) -> dict[str, np.ndarray]:
    """The same for each row, (rows,); empty without rows."""
    if not answers:
        return {}
    from sacrebleu.metrics.chrf import CHRF

    pairs, chrf = list(zip(answers, references, strict=True)), CHRF()
    return {
        "exact_match": np.asarray([float(a.strip() == r.strip()) for a, r in pairs]),
        "rouge_l": np.asarray([rouge_l(a, r) for a, r in pairs]),
        "chrf": np.asarray([chrf.sentence_score(a, [r]).score / 100 for a, r in pairs]),
    }


class Answered(NamedTuple):
    """Scores of several models' answers to the same rows, with intervals."""

    scores: list[dict[str, Any]]  # of each model, with the 95 % interval of each score under `intervals`
    difference: dict[str, tuple[float, float]]  # 95 % interval of the last model's score minus the first one's
    rows: int


def answer_scores(told: Sequence[Mapping[int, str]], references: Mapping[int, str]) -> Answered:
    """Each model's answers by row, scored against the rows' references. A row counts where every model answered it."""
    places = [place for place in references if all(place in said for said in told)]
    found = [row_scores([said[place] for place in places], [references[place] for place in places]) for said in told]
    scores: list[dict[str, Any]] = []
    for one in found:
        means: dict[str, Any] = {name: float(values.mean()) for name, values in one.items()}
        scores.append(means | ({"intervals": {name: interval(values) for name, values in one.items()}} if one else {}))
    gaps = {name: resampled(found[-1][name] - found[0][name]) for name in found[0]} if len(found) > 1 else {}
    return Answered(scores, gaps, len(places))


RESAMPLES = 2000


def interval(values: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of a mean. For values that are all 0 or 1 it is Wilson's (1927), which also holds for few rows that all
    agree; otherwise the percentiles of a bootstrap over the rows (Efron 1979)."""
    return share_interval(float(values.mean()), len(values)) if np.isin(values, (0.0, 1.0)).all() else resampled(values)


def share_interval(share: float, rows: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion of `rows`."""
    middle, spread = share + z * z / (2 * rows), z * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    return (middle - spread) / (1 + z * z / rows), (middle + spread) / (1 + z * z / rows)


def difference_interval(one: float, other: float, rows: int) -> tuple[float, float]:
    """95 % interval of `other` − `one`, two proportions of `rows` each (Newcombe 1998, method 10): wider than needed where they are
    of the same rows, whose agreement it does not know."""
    (low_one, high_one), (low, high) = share_interval(one, rows), share_interval(other, rows)
    change = other - one
    return change - math.hypot(other - low, high_one - one), change + math.hypot(high - other, one - low_one)


def resampled(values: np.ndarray) -> tuple[float, float]:
    draws = np.random.default_rng(0).choice(values, (RESAMPLES, len(values))).mean(1)
    low, high = np.percentile(draws, (2.5, 97.5))
    return float(low), float(high)


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L (Lin 2004): F1 of the longest common subsequence of lower-case words, 0 to 1."""
    return similarity.rouge_l(similarity.words_of(answer), similarity.words_of(reference))
