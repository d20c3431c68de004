"""Sampling: from logits to the next token, and from tokens to text that may be shown.

Each sequence has a random generator of its own and draws one number per token, so the same seed gives the same answer whatever
else is in the batch. The draw walks the candidates in a fixed order (inverse transform sampling).
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from app.inference.protocol import Logprob, Sampling
from app.kit.overlap import overlap
from worker.inference.constraint import Constraint
from worker.modeling.draws import pick
from worker.runtime.transfer import sent

CANDIDATES = 256
"""Tokens considered first for top-p: nearly always enough, and far cheaper than sorting the vocabulary."""

COLDEST = 1e-4
"""The minimum temperature; lower values are raised to it. The likeliest token is then all but certain, and nothing overflows."""


@contextlib.contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Within this context a CPU computes on the current thread only. Operations on one vocabulary are so short that waking
    another thread takes longer: 25 µs for the sum of 49,152 exponentials, and 320 with two threads that sleep while they wait."""
    before = torch.get_num_threads()
    if device.type != "cpu" or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Sampler:
    """Samples the tokens of one sequence, and counts them for the penalties."""

    def __init__(self, sampling: Sampling, seed: int, prompt: list[int], constraint: Constraint | None = None) -> None:
        self.sampling, self.constraint = sampling, constraint
        self.generator = torch.Generator().manual_seed(seed % 2**63)
        self.counts: Counter[int] = Counter()
        self.seen: set[int] = set(prompt) if sampling.repetition_penalty != 1 else set()

    def choose(self, logits: torch.Tensor) -> int:
        """Sample one token from logits (V,) in float32, which are not changed."""
        logits = self.adjusted(logits)
        if self.sampling.temperature == 0:
            return self.count(int(logits.argmax()))
        return self.count(self.draw((logits - logits.max()) / self.heat, self.number()))

    @property
    def heat(self) -> float:
        return max(self.sampling.temperature, COLDEST)

    def count(self, token: int) -> int:
        """Count a token that was chosen, for the penalties, and go on in the grammar of the answer."""
        self.counts[token] += 1
        if self.constraint is not None:
            self.constraint.take(token)
        if self.sampling.repetition_penalty != 1:
            self.seen.add(token)
        return token

    def adjusted(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits after penalties, bias and the constraint; the repetition penalty is that of Keskar et al. 2019, CTRL,
        https://arxiv.org/abs/1909.05858, section 4.1."""
        s = self.sampling
        if s.repetition_penalty == 1 and not s.frequency_penalty and not s.presence_penalty and not s.logit_bias:
            return logits if self.constraint is None else self.constraint.masked(logits)
        logits = logits.clone()
        if self.seen:
            at = sent(torch.tensor(sorted(self.seen)), logits.device)
            old = logits[at]
            logits[at] = torch.where(old > 0, old / s.repetition_penalty, old * s.repetition_penalty)
        if self.counts and (s.frequency_penalty or s.presence_penalty):
            at = sent(torch.tensor(list(self.counts)), logits.device)
            often = sent(torch.tensor(list(self.counts.values()), dtype=logits.dtype), logits.device)
            logits[at] -= often * s.frequency_penalty + s.presence_penalty
        if biased := {token: bias for token, bias in s.logit_bias.items() if 0 <= token < len(logits)}:
            at = sent(torch.tensor(list(biased)), logits.device)
            logits[at] += sent(torch.tensor(list(biased.values()), dtype=logits.dtype), logits.device)
        return logits if self.constraint is None else self.constraint.masked(logits)

    def number(self) -> float:
        """A draw from [0, 1), of which every token takes exactly one."""
        return torch.rand((), generator=self.generator, dtype=torch.float64).item()

    def takes_all(self, size: int) -> bool:
        """Whether any of the `size` tokens may be drawn."""
        s = self.sampling
        return s.top_p == 1 and s.min_p == 0 and not 0 < s.top_k < size

    def draw(self, logits: torch.Tensor, u: float) -> int:
        """The draw for `u` after top-k, min-p and top-p (Holtzman et al. 2020, https://arxiv.org/abs/1904.09751; min-p: Nguyen et al.
        2024, https://arxiv.org/abs/2407.01082)."""
        total, size = logits.logsumexp(0), logits.shape[0]
        if self.takes_all(size):
            return pick((logits - total).exp(), u)
        count = min(self.sampling.top_k or size, size)
        best, tokens = logits.topk(min(count, CANDIDATES))
        found = self.draw_among(best, tokens, total, u, size)
        if found is None:
            best, tokens = logits.topk(count) if count < size else logits.sort(descending=True, stable=True)
            found = self._among(best, tokens, total, u, size)
        return found

    def draw_among(self, best: torch.Tensor, tokens: torch.Tensor, total: torch.Tensor, u: float, size: int) -> int | None:
        """The draw for `u` from the likeliest tokens, their logits in descending order, `total` the logsumexp of all `size`; None where they may
        not include every token that may be drawn."""
        count = min(self.sampling.top_k or size, size, CANDIDATES)
        best, tokens = best[:count], tokens[:count]
        return self._among(best, tokens, total, u, size) if self._enough(best, total, min(self.sampling.top_k or size, size)) else None

    def _among(self, best: torch.Tensor, tokens: torch.Tensor, total: torch.Tensor, u: float, size: int) -> int:
        s = self.sampling
        if 0 < s.top_k < size:
            total = best.logsumexp(0)
        p = (best - total).exp()
        keep = p >= s.min_p * p[0]
        if s.top_p < 1:
            # A token is kept while the probability before it is below top_p, so the one that crosses it is included.
            keep &= p.cumsum(0) - p < s.top_p
        keep[0] = True
        return int(tokens[pick(p[keep], u)])

    def _enough(self, best: torch.Tensor, total: torch.Tensor, count: int) -> bool:
        """Whether the first candidates are certain to include every token that may be drawn."""
        if len(best) == count:
            return True
        p = (best - total).exp()
        return bool(p[-1] < self.sampling.min_p * p[0]) or bool(p.sum() >= self.sampling.top_p and not self.sampling.top_k)


# Text ---------------------------------------------------------------------------------------------------------------


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE writes for bytes (Radford et al. 2019, GPT-2): printable ones are unchanged."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """The UTF-8 bytes of a token, possibly an incomplete character. A SentencePiece token keeps the space before its word, which
    it loses when it is decoded alone."""
    text = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    piece = tokenizer.convert_ids_to_tokens(token) or ""
    if "�" not in text:
        return (" " + text if piece.startswith("▁") and not text.startswith(" ") else text).encode()
    if len(piece) == 6 and piece.startswith("<0x"):
        return bytes([int(piece[3:5], 16)])
    alphabet = _byte_alphabet()
    return bytes(alphabet[c] for c in piece) if all(c in alphabet for c in piece) else text.encode()


def logprob(tokenizer: Any, logits: torch.Tensor, token: int, top: int) -> Logprob:
    """Log-probability of `token` and the `top` likeliest tokens, from logits (V,) in float32 before any sampling setting."""
    logs = logits.log_softmax(-1)
    said = say(tokenizer, token, float(logs[token]))
    said.top = likeliest(tokenizer, logs, top)
    return said


def likeliest(tokenizer: Any, logs: torch.Tensor, top: int) -> list[Logprob]:
    """The `top` likeliest tokens of (V,) log-probabilities, likeliest first."""
    if not top:
        return []
    values, ids = logs.topk(min(top, logs.shape[0]))
    return [say(tokenizer, int(i), float(v)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]


def say(tokenizer: Any, token: int, value: float) -> Logprob:
    raw = token_bytes(tokenizer, token)
    return Logprob(token=raw.decode("utf-8", "replace"), bytes=list(raw), logprob=max(value, -9999.0) if not math.isnan(value) else -9999.0)


class Detokenizer:
    """Decodes tokens to text incrementally. Emitted text is never revised: a piece is held back while it may be an incomplete
    character or the beginning of a stop string. Special tokens are left out; with `hidden` those alone are."""

    def __init__(self, tokenizer: Any, prompt: list[int], stops: tuple[str, ...], hidden: frozenset[int] | None = None) -> None:
        self.tokenizer, self.stops, self.hidden = tokenizer, stops, hidden
        # A few prompt tokens come first, because some tokenizers drop the space of a first token.
        self.ids = list(prompt[-6:])
        self.start, self.read = 0, len(self.ids)
        self.held = ""
        self.shown = 0  # characters emitted
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that may be shown after this token; sets `stopped` when a stop string is complete."""
        self.ids.append(token)
        self.held += self._new_text()
        return self._release(final=False)

    def end(self) -> str:
        """The text held back when no token follows; an incomplete character is dropped."""
        return "" if self.stopped else self._release(final=True)

    def _new_text(self) -> str:
        before = self._decode(self.ids[self.start : self.read])
        after = self._decode(self.ids[self.start :])
        # A character has at most four bytes: a replacement character that remains after four tokens is the model's own.
        if len(after) <= len(before) or (after.endswith("�") and len(self.ids) - self.read < 4):
            return ""
        self.start, self.read = self.read, len(self.ids)
        return after[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        if self.hidden is not None:
            ids = [i for i in ids if i not in self.hidden]
        return self.tokenizer.decode(ids, skip_special_tokens=self.hidden is None, clean_up_tokenization_spaces=False)

    def _release(self, *, final: bool) -> str:
        found = [at for at in (self.held.find(s) for s in self.stops) if at >= 0]
        if found:
            self.stopped = True
            shown, self.held = self.held[: min(found)], ""
            self.shown += len(shown)
            return shown
        keep = 0 if final else max((overlap(self.held, s) for s in self.stops), default=0)
        cut = len(self.held) - keep
        shown, self.held = self.held[:cut], self.held[cut:]
        self.shown += len(shown)
        return shown
