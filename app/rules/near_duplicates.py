"""Near duplicates by MinHash: rows whose word triples are nearly the same set.

Broder, "On the resemblance and containment of documents" (1997), section 3: the share of equal minima estimates the
Jaccard likeness of two sets. Signatures are cut into bands, and only rows that agree in a whole band are compared
(Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", section 3.4).
"""

from __future__ import annotations

import zlib
from array import array
from typing import TYPE_CHECKING

from app.formats import Finding
from app.formats._base import fix
from app.rules._base import MOST_ROWS, Rule, Seen

if TYPE_CHECKING:
    import numpy as np

HASHES, BANDS = 64, 16
ALIKE = 0.8
FEWEST_WORDS = 8
MOST_WORDS_KNOWN = 100_000
"""Words whose hash is remembered."""


class NearDuplicates(Rule):
    def __init__(self, say, task) -> None:  # type: ignore[no-untyped-def]
        import numpy as np

        super().__init__(say, task)
        draw = np.random.default_rng(20260101)
        # x → ax + b modulo 2³² with an odd a mixes the numbers well enough for minima, and fits a processor's lanes.
        self._a = draw.integers(0, 1 << 31, size=(HASHES, 1), dtype=np.uint32) * np.uint32(2) + np.uint32(1)
        self._b = draw.integers(0, 1 << 32, size=(HASHES, 1), dtype=np.uint32)
        self._mix = draw.integers(0, 1 << 63, size=3, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        self._of_word: dict[str, int] = {}
        self._signatures = bytearray()
        self._lines = array("q")
        self._exact: set[int] = set()

    def see(self, seen: Seen) -> None:
        import numpy as np

        if len(self._lines) >= MOST_ROWS:
            return
        if len(seen.words) < FEWEST_WORDS:
            return
        whole = hash(tuple(seen.texts))
        if whole in self._exact:  # another rule tells of rows that are the same
            return
        self._exact.add(whole)
        hashed = np.array(self._hashes(seen.words), dtype=np.uint64)
        first, second, third = self._mix
        triples = (hashed[:-2] * first + hashed[1:-1] * second + hashed[2:] * third) >> np.uint64(32)
        self._signatures += (self._a * triples.astype(np.uint32) + self._b).min(axis=1).tobytes()
        self._lines.append(seen.line)

    def _hashes(self, words: list[str]) -> list[int]:
        known = self._of_word
        if len(known) >= MOST_WORDS_KNOWN:
            known.clear()
        for word in words:
            if word not in known:
                known[word] = zlib.crc32(word.encode())
        return [known[word] for word in words]

    def finish(self) -> None:
        import numpy as np

        signatures = np.frombuffer(bytes(self._signatures), dtype=np.uint32).reshape(-1, HASHES)
        best: dict[int, tuple[float, int]] = {}
        width = HASHES // BANDS
        for band in range(BANDS):
            part = np.ascontiguousarray(signatures[:, band * width : (band + 1) * width])
            keys = part.view(np.dtype((np.void, part.dtype.itemsize * width))).ravel()
            order = np.argsort(keys, kind="stable")
            same = keys[order][1:] == keys[order][:-1]
            for group in _groups(order, same):
                first = group[0]
                shares = (signatures[group[1:]] == signatures[first]).mean(axis=1)
                for row, share in zip(group[1:].tolist(), shares.tolist(), strict=True):
                    if share >= ALIKE and share > best.get(row, (0.0, 0))[0]:
                        best[row] = (share, int(first))
        for row, (share, first) in sorted(best.items()):
            message = f"This row says nearly the same as line {self._lines[first]} (about {share:.0%} alike)."
            self.say(self._lines[row], Finding("near_duplicate", message, severity="warning", fix=fix("Drop the row", "drop_row")))


def _groups(order: np.ndarray, same: np.ndarray) -> list[np.ndarray]:
    """Runs of rows with an equal key, as row numbers in rising order."""
    import numpy as np

    if not same.any():
        return []
    edges = np.flatnonzero(np.diff(np.concatenate([[0], same.astype(np.int8), [0]])))
    return [np.sort(order[start : end + 1]) for start, end in zip(edges[::2], edges[1::2], strict=True)]
