"""Label noise: rows whose label the other rows contradict.

A naive Bayes classifier over hashed words gives each row a probability of its own label, trained on the other four fifths of the
rows (cross-validation); a row where another label is far likelier is reported. Confident learning in its simplest form:
Northcutt, Jiang and Chuang 2021, Confident Learning, https://arxiv.org/abs/1911.00068, section 3.
"""

from __future__ import annotations

import math
import zlib
from array import array
from collections.abc import Mapping
from typing import TYPE_CHECKING

from app.datasets.rules._base import MAX_ROWS, Rule, Say, Seen
from app.formats import Format, RowFinding
from app.formats._base import fix, shown

if TYPE_CHECKING:
    import numpy as np

WIDTH = 1 << 15
FOLDS = 5
MAX_LABELS = 64
MIN_ROWS = 100
OWN, OTHER = 0.03, 0.9
"""A row is reported when its own label gets less than OWN and another more than OTHER."""
MIN_ACCURACY = 0.7
"""Minimum accuracy of the classifier; below it, words do not predict the labels."""


class LabelNoise(Rule):
    def __init__(self, say: Say, entry: Format, mapping: Mapping[str, str]) -> None:
        super().__init__(say, entry, mapping)
        self._features, self._starts = array("i"), array("q", [0])
        self._lines, self._labels = array("q"), array("i")
        self._names: dict[str, int] = {}

    def see(self, seen: Seen) -> None:
        if not self.classifies or len(self._lines) >= MAX_ROWS:
            return
        words = {zlib.crc32(word.encode()) % WIDTH for word in seen.asked}
        self._features.extend(words)
        self._starts.append(len(self._features))
        self._lines.append(seen.line)
        self._labels.append(self._names.setdefault(seen.row["label"], len(self._names)))

    def finish(self) -> None:
        import numpy as np

        rows, classes = len(self._lines), len(self._names)
        if rows < MIN_ROWS or not 2 <= classes <= MAX_LABELS:
            return
        features, starts = np.array(self._features), np.array(self._starts)
        labels, names = np.array(self._labels), list(self._names)
        owner = np.repeat(np.arange(rows), np.diff(starts))
        fold = np.arange(rows) % FOLDS
        guessed: list[tuple[int, int, bool]] = []
        for number in range(FOLDS):
            prior, words = self._probabilities(features, owner, labels, fold != number, classes)
            for row in np.flatnonzero(fold == number).tolist():
                own = features[starts[row] : starts[row + 1]]
                # Words of a text are not independent, so their evidence is worth less than its sum.
                logs = prior + words[:, own].sum(axis=1) / max(1.0, math.sqrt(len(own)))
                share = np.exp(logs - logs.max())
                share /= share.sum()
                best = int(share.argmax())
                guessed.append((row, best, bool(share[labels[row]] < OWN and share[best] > OTHER)))
        if sum(best == labels[row] for row, best, _ in guessed) < MIN_ACCURACY * rows:
            return
        for row, best, doubtful in sorted(guessed):
            if doubtful:
                self._tell(row, names[int(labels[row])], names[best])

    def _probabilities(
        self, features: np.ndarray, owner: np.ndarray, labels: np.ndarray, used: np.ndarray, classes: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Log prior of each class (C,) and log likelihood of each word in each class (C, WIDTH), with add-one smoothing."""
        import numpy as np

        keep = used[owner]
        counts = np.bincount(labels[owner[keep]] * WIDTH + features[keep], minlength=classes * WIDTH).reshape(classes, WIDTH) + 0.1
        prior = np.bincount(labels[used], minlength=classes) + 1.0
        return np.log(prior / prior.sum()), np.log(counts / counts.sum(axis=1, keepdims=True)).astype(np.float32)

    def _tell(self, row: int, own: str, other: str) -> None:
        message = f"Its words are typical of “{shown(other, 60)}”, not of “{shown(own, 60)}”. The label may be wrong."
        self.say(self._lines[row], RowFinding("label_noise", message, None, shown(own, 60), "warning", fix("Remove row", "drop_row")))
