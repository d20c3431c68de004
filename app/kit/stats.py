"""Confidence intervals of proportions and means, and exact paired tests. Pure, and without scipy, which the web process does not have."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence

SURE = 0.05
"""Significance level: a difference counts where its p-value is below this."""


def wilson(right_ones: float, rows: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95% interval of a proportion (Wilson 1927); (0, 1) without rows."""
    if rows == 0:
        return 0.0, 1.0
    p = right_ones / rows
    middle, half = p + z * z / (2 * rows), z * math.sqrt(p * (1 - p) / rows + z * z / (4 * rows * rows))
    below = 1 + z * z / rows
    return max(0.0, (middle - half) / below), min(1.0, (middle + half) / below)


def interval(scores: Sequence[float]) -> tuple[float, float]:
    """95% interval of the mean: Wilson's where every score is 0 or 1, otherwise a bootstrap over the rows (Efron 1979)."""
    if not scores or all(s in (0.0, 1.0) for s in scores):
        return wilson(sum(scores), len(scores))
    draw = random.Random(0)
    means = sorted(sum(draw.choices(scores, k=len(scores))) / len(scores) for _ in range(1000))
    return means[24], means[974]


def spread(values: Sequence[float], z: float = 1.959964) -> tuple[float, float]:
    """95% interval of the mean of two or more values by the normal approximation: as wide as a bootstrap's, and fast for
    thousands of them."""
    middle, half = statistics.fmean(values), z * statistics.stdev(values) / math.sqrt(len(values))
    return middle - half, middle + half


def sign_test(won: int, lost: int) -> float:
    """Two-sided p-value of the exact sign test, with ties removed before.

    Over the rows on which two models disagree it is McNemar's exact test (McNemar 1947).
    """
    n, few, ways, term = won + lost, min(won, lost), 0, 1
    for k in range(few + 1):
        ways += term
        term = term * (n - k) // (k + 1)
    return min(1.0, float(2 * ways / 2**n))


def clopper_pearson(won: int, votes: int) -> tuple[float, float]:
    """The exact 95% interval of a proportion (Clopper and Pearson 1934). It excludes one half exactly where `sign_test` < 0.05."""
    low = 0.0 if won == 0 else _root(lambda p: _at_least(won, votes, p) < SURE / 2)
    high = 1.0 if won == votes else _root(lambda p: 1 - _at_least(won + 1, votes, p) > SURE / 2)
    return low, high


def _at_least(k: int, n: int, p: float) -> float:
    """Probability of k or more successes in n draws."""
    log_p, log_q = math.log(p), math.log1p(-p)
    ways = (math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * log_p + (n - i) * log_q for i in range(k, n + 1))
    return math.fsum(map(math.exp, ways))


def _root(below: Callable[[float], bool]) -> float:
    """The point in (0, 1) where `below`, true at the left end, becomes false."""
    left, right = 0.0, 1.0
    for _ in range(50):
        middle = (left + right) / 2
        left, right = (middle, right) if below(middle) else (left, middle)
    return right


def paired_shares(both: int, first: int, second: int, neither: int) -> tuple[float, float]:
    """95% interval of the difference of two paired proportions, first − second (Newcombe 1998, method 10).

    `first` counts the rows that only the first got right. It holds for few rows too, and where all of them agree.
    """
    n = both + first + second + neither
    one, other = (both + first) / n, (both + second) / n
    (low_1, high_1), (low_2, high_2) = wilson(both + first, n), wilson(both + second, n)
    margins = (both + first) * (second + neither) * (both + second) * (first + neither)
    agree = both * neither - first * second
    phi = (max(agree - n / 2, 0.0) if agree > 0 else float(agree)) / math.sqrt(margins) if margins else 0.0
    down = _root_sum(one - low_1, high_2 - other, phi)
    up = _root_sum(high_1 - one, other - low_2, phi)
    return one - other - down, one - other + up


MIN_PAIRED = 5
"""Rows below which a difference of means is not told: equal differences of two rows would look certain."""


def paired(one: Sequence[float], other: Sequence[float]) -> tuple[float, float] | None:
    """95% interval of the mean of other − one over the same rows: Newcombe's where all are 0 or 1, otherwise a paired Student's t.
    None for fewer than MIN_PAIRED rows."""
    n = len(one)
    if n < MIN_PAIRED:
        return None
    if all(value in (0.0, 1.0) for value in (*one, *other)):
        pairs = list(zip(one, other, strict=True))
        return paired_shares(*(pairs.count(pair) for pair in ((1, 1), (0, 1), (1, 0), (0, 0))))
    return spread([b - a for a, b in zip(one, other, strict=True)], t_quantile(n - 1))


def t_quantile(freedom: int, z: float = 1.959964) -> float:
    """The 97.5% quantile of Student's t, by the expansion of Cornish and Fisher (Abramowitz and Stegun 26.7.5); within 0.1% from 4 on."""
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third, fourth = (
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + first / freedom + second / freedom**2 + third / freedom**3 + fourth / freedom**4


def _root_sum(a: float, b: float, phi: float) -> float:
    return math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))
