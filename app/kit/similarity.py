"""How similar two texts are, 0 to 1, by words in lower case."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

MAX_COMPARED = 50_000
"""Characters: some of these take the product of both lengths."""
Words = Sequence[str]


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _grams(words: Words, n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _f1(common: int, one: int, other: int) -> float:
    return 2 * common / (one + other) if one + other else 0.0


def rouge_n(answer: Words, reference: Words, n: int) -> float:
    """ROUGE-N (Lin 2004): F1 of the common n-grams."""
    one, other = _grams(answer, n), _grams(reference, n)
    if not one or not other:
        return float(list(answer) == list(reference))
    return _f1((one & other).total(), one.total(), other.total())


def rouge_l(answer: Words, reference: Words) -> float:
    """ROUGE-L (Lin 2004): F1 of the longest common subsequence of words."""
    if not answer or not reference:
        return float(list(answer) == list(reference))
    from rapidfuzz.distance import LCSseq

    return _f1(int(LCSseq.similarity(answer, reference)), len(answer), len(reference))


def bleu(answer: Words, reference: Words) -> float:
    """Sentence BLEU (Papineni et al. 2002) with exponential smoothing and effective order, as sacreBLEU has them."""
    if not answer or not reference:
        return float(list(answer) == list(reference))
    logs, smooth = [], 1.0
    for n in range(1, 5):
        one = _grams(answer, n)
        if not one:
            break
        hits = (one & _grams(reference, n)).total()
        if n == 1 and not hits:
            return 0.0
        smooth = smooth if hits else smooth * 2
        logs.append(math.log((hits or 1 / smooth) / one.total()))
    short = min(0.0, 1 - len(reference) / len(answer))
    return math.exp(short + sum(logs) / len(logs))


def gleu(answer: Words, reference: Words) -> float:
    """Google-BLEU (Wu et al. 2016): of all 1- to 4-grams, the smaller of precision and recall."""
    one, other = (sum((_grams(words, n) for n in range(1, 5)), Counter[tuple[str, ...]]()) for words in (answer, reference))
    most = max(one.total(), other.total())
    return (one & other).total() / most if most else 1.0


def meteor(answer: Words, reference: Words) -> float:
    """METEOR (Banerjee and Lavie 2005) with its exact module: words match where they are equal; stems and synonyms do not."""
    places: dict[str, list[int]] = {}
    for place in reversed(range(len(reference))):
        places.setdefault(reference[place], []).append(place)
    free = {word: set(found) for word, found in places.items()}
    matched: list[int | None] = []
    for word in answer:
        left = free.get(word)
        if not left:
            matched.append(None)
            continue
        after = matched[-1] + 1 if matched and matched[-1] is not None else -1
        if after not in left:  # no match that continues a chunk: the first that is free
            while places[word][-1] not in left:
                places[word].pop()
            after = places[word][-1]
        left.discard(after)
        matched.append(after)
    hits = sum(place is not None for place in matched)
    if not hits:
        return float(not answer and not reference)
    chunks = sum(place is not None and (i == 0 or matched[i - 1] is None or matched[i - 1] != place - 1) for i, place in enumerate(matched))
    precision, recall = hits / len(answer), hits / len(reference)
    return 10 * precision * recall / (recall + 9 * precision) * (1 - 0.5 * (chunks / hits) ** 3)


def fuzzy_match(answer: str, reference: str) -> float:
    """rapidfuzz's WRatio without regard to case and punctuation."""
    from rapidfuzz import fuzz, utils

    return fuzz.WRatio(answer, reference, processor=utils.default_process) / 100


def cosine(one: Sequence[float], other: Sequence[float]) -> float:
    """Cosine of the angle between two vectors, 0 where it is negative."""
    lengths = math.sqrt(sum(x * x for x in one)) * math.sqrt(sum(x * x for x in other))
    return max(0.0, min(1.0, sum(x * y for x, y in zip(one, other, strict=True)) / lengths)) if lengths else 0.0


BY_WORDS: dict[str, Callable[[Words, Words], float]] = {
    "bleu": bleu,
    "gleu": gleu,
    "meteor": meteor,
    "rouge_1": lambda a, r: rouge_n(a, r, 1),
    "rouge_2": lambda a, r: rouge_n(a, r, 2),
    "rouge_3": lambda a, r: rouge_n(a, r, 3),
    "rouge_4": lambda a, r: rouge_n(a, r, 4),
    "rouge_5": lambda a, r: rouge_n(a, r, 5),
    "rouge_l": rouge_l,
}
