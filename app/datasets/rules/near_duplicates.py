"""Near duplicates by MinHash: rows whose prompts have nearly the same word trigrams, and whose answers have too.

Broder 1997, On the resemblance and containment of documents, section 3: the share of equal minima estimates the Jaccard
similarity of two sets. Signatures are divided into bands, and only rows that agree in a whole band are compared
(locality-sensitive hashing: Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, section 3.4).
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Mapping
from typing import TYPE_CHECKING

from app.datasets.rules._base import MAX_ROWS, Rule, Say, Seen
from app.formats import Format, RowFinding
from app.formats._base import fix

if TYPE_CHECKING:
    import numpy as np

BANDS, ASKED, TRAINED = 16, 4, 2
"""Number of bands, and minima of prompt and of answer in each; only rows similar in both share a band."""
ALIKE = 0.8
MIN_WORDS = 8
EDGE_WORDS, LONG_WORDS = 12, 60
"""In a prompt of more than LONG_WORDS a passage may outweigh the question about it, which is at one of the ends."""
MAX_WORDS_KNOWN, MAX_WORD_KNOWN_LENGTH = 100_000, 100
"""Words whose hash is cached, and characters of one: a cell may be a single word of megabytes."""


class NearDuplicates(Rule):
    def __init__(self, say: Say, entry: Format, mapping: Mapping[str, str]) -> None:
        import numpy as np

        super().__init__(say, entry, mapping)
        draw = np.random.default_rng(20260101)
        # x → ax + b modulo 2³² with an odd a mixes well enough for minima, and vectorizes.
        self._a = draw.integers(0, 1 << 31, size=(BANDS * ASKED, 1), dtype=np.uint32) * np.uint32(2) + np.uint32(1)
        self._b = draw.integers(0, 1 << 32, size=(BANDS * ASKED, 1), dtype=np.uint32)
        self._mix = draw.integers(0, 1 << 63, size=3, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        self._of_word: dict[str, int] = {}
        self._asked, self._trained = bytearray(), bytearray()
        self._edges = bytearray()
        self._lines = array("q")
        self._exact: set[int] = set()

    def see(self, seen: Seen) -> None:
        if len(self._lines) >= MAX_ROWS:
            return
        if len(seen.asked) + len(seen.trained) < MIN_WORDS:
            return
        whole = hash((tuple(seen.texts), seen.row.get("label"), seen.row.get("good")))
        if whole in self._exact:  # another rule reports identical rows
            return
        self._exact.add(whole)
        self._asked += self._signature(seen.asked, BANDS * ASKED)
        self._trained += self._signature(seen.trained, BANDS * TRAINED)
        self._edges += self._edges_of(seen.asked)
        self._lines.append(seen.line)

    def _signature(self, words: list[str], minima: int) -> bytes:
        """The minimum of each hash over all word trigrams; fewer than three words are one trigram, padded."""
        import numpy as np

        hashed = np.array(self._hashes(words) + [0] * (3 - len(words)), dtype=np.uint64)
        first, second, third = self._mix
        triples = (hashed[:-2] * first + hashed[1:-1] * second + hashed[2:] * third) >> np.uint64(32)
        hashes: bytes = (self._a[:minima] * triples.astype(np.uint32) + self._b[:minima]).min(axis=1).tobytes()
        return hashes

    def _edges_of(self, words: list[str]) -> bytes:
        """The words at both ends of a long prompt, as hashes; zeros for a short one, where every word counts anyway."""
        import numpy as np

        ends = [*words[:EDGE_WORDS], *words[-EDGE_WORDS:]] if len(words) > LONG_WORDS else []
        return np.array(self._hashes(ends) or [0] * (2 * EDGE_WORDS), dtype=np.uint32).tobytes()

    def _hashes(self, words: list[str]) -> list[int]:
        known = self._of_word
        if len(known) >= MAX_WORDS_KNOWN:
            known.clear()
        hashes = []
        for word in words:
            found = known.get(word)
            if found is None:
                found = zlib.crc32(word.encode())
                if len(word) <= MAX_WORD_KNOWN_LENGTH:
                    known[word] = found
            hashes.append(found)
        return hashes

    def finish(self) -> None:
        import numpy as np

        asked = np.frombuffer(bytes(self._asked), dtype=np.uint32).reshape(-1, BANDS * ASKED)
        trained = np.frombuffer(bytes(self._trained), dtype=np.uint32).reshape(-1, BANDS * TRAINED)
        best: dict[int, tuple[float, int]] = {}
        for band in range(BANDS):
            parts = [side[:, band * width : (band + 1) * width] for side, width in ((asked, ASKED), (trained, TRAINED))]
            part = np.ascontiguousarray(np.concatenate(parts, axis=1))
            keys = part.view(np.dtype((np.void, part.dtype.itemsize * part.shape[1]))).ravel()
            order = np.argsort(keys, kind="stable")
            same = keys[order][1:] == keys[order][:-1]
            for group in _groups(order, same):
                first, others = int(group[0]), group[1:]
                shares = np.minimum((asked[others] == asked[first]).mean(axis=1), (trained[others] == trained[first]).mean(axis=1))
                for row, share in zip(others.tolist(), shares.tolist(), strict=True):
                    if share >= ALIKE and share > best.get(row, (0.0, 0))[0] and self._ends_alike(first, row):
                        best[row] = (share, first)
        for row, (share, first) in sorted(best.items()):
            message = f"This row is nearly the same as line {self._lines[first]} (about {share:.0%} alike)."
            self.say(self._lines[row], RowFinding("near_duplicate", message, severity="warning", fix=fix("Remove row", "drop_row")))

    def _ends_alike(self, one: int, other: int) -> bool:
        """Whether two prompts begin and end with nearly the same words."""
        size = 4 * EDGE_WORDS
        ends = [self._edges[at : at + size] for row in (one, other) for at in (2 * size * row, 2 * size * row + size)]
        return _likeness(ends[0], ends[2]) >= ALIKE and _likeness(ends[1], ends[3]) >= ALIKE


def _likeness(one: bytes | bytearray, other: bytes | bytearray) -> float:
    """Jaccard similarity of two sets of hashed words, four bytes each."""
    a, b = ({words[at : at + 4] for at in range(0, len(words), 4)} for words in (bytes(one), bytes(other)))
    return len(a & b) / len(a | b)


def _groups(order: np.ndarray, same: np.ndarray) -> list[np.ndarray]:
    """Runs of rows with an equal key, as row numbers in ascending order."""
    import numpy as np

    if not same.any():
        return []
    edges = np.flatnonzero(np.diff(np.concatenate([[0], same.astype(np.int8), [0]])))
    return [np.sort(order[start : end + 1]) for start, end in zip(edges[::2], edges[1::2], strict=True)]
