"""What the next tokens of a step are chosen from. On a CPU each sequence looks at its own logits; on a GPU, where each look waits for
the device, all that they may need is computed for all of them at once and read in one copy.

Both give the same token for the same random number, and the draw itself (`worker/inference/sampling.py`) exists once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from app.inference.protocol import Logprob
from worker.inference import sampling
from worker.inference.sampling import CANDIDATES, Sampler, say
from worker.modeling.draws import pick_each
from worker.runtime import devices
from worker.runtime.transfer import AsyncScalars, sent


class NextTokenQuery(NamedTuple):
    """One sequence: its row of the logits, its sampler (None: the likeliest token is enough), and how many likeliest tokens are told
    beside the chosen one (None: no log-probabilities)."""

    row: int
    sampler: Sampler | None
    top: int | None


class Options(Protocol):
    """`likeliest` is None where the logits are not finite."""

    likeliest: int | None

    def sampled(self, sampler: Sampler) -> int: ...

    def logprob(self, tokenizer: Any, token: int, top: int) -> Logprob: ...


@dataclass
class _OwnRow:
    logits: torch.Tensor  # (V,)
    likeliest: int | None

    def sampled(self, sampler: Sampler) -> int:
        return sampler.choose(self.logits)

    def logprob(self, tokenizer: Any, token: int, top: int) -> Logprob:
        return sampling.logprob(tokenizer, self.logits, token, top)


def options(logits: torch.Tensor, wanted: Sequence[NextTokenQuery]) -> Sequence[Options]:
    """For logits (N, V) in float32, the options of each sequence."""
    if devices.is_gpu(logits.device):
        return read_ahead(logits, wanted)
    # For all rows at once: greedy sequences need no more than this.
    highest, likeliest = logits.max(-1)
    finite, tokens = highest.isfinite().tolist(), likeliest.tolist()  # NaN propagates to the maximum
    return [_OwnRow(logits[w.row], tokens[w.row] if finite[w.row] else None) for w in wanted]


@dataclass
class _Read:
    """Numbers of one row on the host. `logs` are log-probabilities by token, and `top` the likeliest tokens, before any sampling setting."""

    logits: torch.Tensor  # (V,), on the device
    likeliest: int | None
    number: float
    scaled: torch.Tensor | None  # (V,), on the device: with penalties and temperature
    read: dict[str, torch.Tensor]
    logs: dict[int, float]

    def sampled(self, sampler: Sampler) -> int:
        assert self.scaled is not None
        token: int | None
        if sampler.sampling.temperature == 0:
            token = int(self.read["tokens"][0])
        elif sampler.takes_all(len(self.scaled)):
            token = int(self.read["drawn"])
        else:
            token = sampler.draw_among(
                self.read["best"].float(), self.read["tokens"], self.read["total"].float(), self.number, len(self.scaled)
            )
        if token is None:  # a flat distribution: seldom, and worth waiting for
            token = sampler.draw(self.scaled, self.number)
        return sampler.count(token)

    def logprob(self, tokenizer: Any, token: int, top: int) -> Logprob:
        if token not in self.logs:
            return sampling.logprob(tokenizer, self.logits, token, top)
        said = say(tokenizer, token, self.logs[token])
        likeliest = zip(self.read["top"][:top].tolist(), self.read["top logs"][:top].tolist(), strict=True)
        said.top = [say(tokenizer, int(i), v) for i, v in likeliest]
        return said


class _Computed(NamedTuple):
    """What is computed for all rows (N, …): `parts` are read. `scaled` (N, V) is None where no row is sampled."""

    parts: dict[str, torch.Tensor]
    logits: torch.Tensor
    scaled: torch.Tensor | None
    numbers: list[float]


def read_ahead(logits: torch.Tensor, wanted: Sequence[NextTokenQuery]) -> list[_Read]:
    """The same with one copy to the host, for which alone the host waits."""
    parts, logits, scaled, numbers = computed(logits, wanted)
    flat = AsyncScalars(list(parts.values())).read()
    pieces = flat.split([part.numel() for part in parts.values()])
    got = {name: piece.view(part.shape) for (name, part), piece in zip(parts.items(), pieces, strict=True)}
    found = []
    for i in range(len(wanted)):
        mine = {name: rows[i] for name, rows in got.items()}
        logs = dict(zip(map(int, mine["eligible"].tolist()), mine["logs"].tolist(), strict=True)) if "logs" in mine else {}
        likeliest = int(mine["likeliest"]) if mine["finite"] else None
        found.append(_Read(logits[i], likeliest, numbers[i], None if scaled is None else scaled[i], mine, logs))
    return found


def computed(logits: torch.Tensor, wanted: Sequence[NextTokenQuery]) -> _Computed:
    rows, size = [w.row for w in wanted], logits.shape[1]
    if rows != list(range(len(logits))):
        logits = logits[sent(torch.tensor(rows), logits.device)]
    highest, likeliest = logits.max(1)
    numbers = [w.sampler.number() if w.sampler is not None and w.sampler.sampling.temperature > 0 else 0.0 for w in wanted]
    parts = {"likeliest": likeliest, "finite": highest.isfinite()}
    eligible = [likeliest[:, None]]
    scaled = _scaled(logits, wanted) if any(w.sampler is not None for w in wanted) else None
    if scaled is not None:
        parts["total"] = scaled.logsumexp(1)
        parts["best"], parts["tokens"] = scaled.topk(min(CANDIDATES, size))
        eligible.append(parts["tokens"])
        if any(w.sampler is not None and w.sampler.takes_all(size) for w in wanted):
            at = sent(torch.tensor(numbers, dtype=torch.float64), logits.device)
            parts["drawn"] = pick_each((scaled - parts["total"][:, None]).exp(), at)
            eligible.append(parts["drawn"][:, None])
    if tops := [w.top for w in wanted if w.top is not None]:
        logs = logits.log_softmax(1)
        parts["top logs"], parts["top"] = logs.topk(min(max(1, *tops), size))
        parts["eligible"] = torch.cat(eligible, 1)
        parts["logs"] = logs.gather(1, parts["eligible"])
    return _Computed(parts, logits, scaled, numbers)


def _scaled(logits: torch.Tensor, wanted: Sequence[NextTokenQuery]) -> torch.Tensor:
    """Logits (N, V) with each sequence's penalties and temperature, the highest of a row at 0."""
    own = torch.stack([w.sampler.adjusted(row) if w.sampler is not None else row for w, row in zip(wanted, logits, strict=True)])
    heat = [w.sampler.heat if w.sampler is not None else 1.0 for w in wanted]
    return (own - own.amax(1, keepdim=True)) / sent(torch.tensor(heat, dtype=own.dtype), own.device)[:, None]
