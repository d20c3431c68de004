"""Fair scheduling: which waiting request begins next, and how prompts in prefill share a step's token budget.

An *account* is one person's chats, or one person's bulk runs (prompt runs). Accounts are treated alike, however many requests
each has.
"""

from __future__ import annotations

import logging
import queue
import time
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from app.inference.protocol import Entry, GenerateRequest, Logprob, Offsets, SeenToken
from worker.inference.sampling import Detokenizer, Sampler

if TYPE_CHECKING:
    import torch

    from worker.inference.model_pool import ModelHandle
    from worker.modeling.kv_cache import Slot

log = logging.getLogger(__name__)

HELD_TO_FREE = 3
"""An account may hold this many times as many rows as are free, so some are always left for newcomers (dynamic thresholds:
Choudhury and Hahne 1998, Dynamic Queue Length Thresholds for Shared-Memory Packet Switches)."""
BULK_SHARE = 0.5
"""Share of the rows that all bulk runs together may hold."""


@dataclass(eq=False)
class TokenSequence:
    """One sequence being generated. It holds a slot from its beginning to its end."""

    index: int
    chooser: Sampler
    text: Detokenizer
    slot: Slot | None = None
    written: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    offsets: Offsets = field(default_factory=Offsets)
    begins: list[int] = field(default_factory=list)
    """The character offset of each token of `logprobs` in the answer."""
    finished: bool = False


@dataclass(eq=False)
class Request:
    """One request in the engine. `read` prompt tokens are in the cache; its sequences share them.

    The first sequence reads the prompt. The others begin as slots become free, from `first_logits` (V,), the logits after the
    prompt, and from the slot of the `keeper`, which holds the prompt until all have begun: copied while the keeper is generating,
    handed on afterwards.
    """

    request: GenerateRequest
    place: ModelHandle
    prompt: list[int]
    max_tokens: int
    out: queue.SimpleQueue[list[Entry]]
    rows: list[TokenSequence]
    began: float
    deadline: float | None = None
    read: int = 0
    cached: int = 0
    cancelled: bool = False
    seen: list[SeenToken] = field(default_factory=list)
    first_logits: torch.Tensor | None = None
    first_token: float | None = None
    arrived: float = field(default_factory=time.monotonic)
    keeper: TokenSequence = field(init=False)

    def __post_init__(self) -> None:
        self.keeper = self.rows[0]

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(self.place.adapters)

    @property
    def account(self) -> tuple[Hashable, bool]:
        return (self.request.owner, self.request.bulk)

    @property
    def written(self) -> int:
        """Tokens generated so far in all its sequences."""
        return sum(len(row.written) for row in self.rows)

    @property
    def is_greedy(self) -> bool:
        s = self.request.sampling
        free = (
            s.repetition_penalty == 1
            and not (s.frequency_penalty or s.presence_penalty or s.logit_bias)
            and self.keeper.chooser.constraint is None
        )
        return free and s.temperature == 0

    @property
    def top_logprobs(self) -> int | None:
        """How many likeliest tokens are told beside each token; None where no log-probabilities are."""
        return self.request.sampling.top_logprobs if self.request.sampling.logprobs else None

    def log_stopped(self) -> None:
        why, most = "nobody reads it" if self.cancelled else "its time is over", self.max_tokens * len(self.rows)
        log.info("Answer %s stopped after %d of %d tokens: %s.", self.request.id, self.written, most, why)

    @property
    def has_read(self) -> bool:
        return self.read == len(self.prompt)

    def next_row(self) -> TokenSequence | None:
        """The sequence that could begin now: the first, and once it has read the prompt the others."""
        row = next((row for row in self.rows if row.slot is None and not row.finished), None)
        return row if row is self.rows[0] or self.has_read else None

    def writing(self) -> list[TokenSequence]:
        return [row for row in self.rows if row.slot is not None and not row.finished and row.written]

    def hand_on(self, row: TokenSequence) -> None:
        """Hand the slot of the keeper, which has finished, to a sequence that has not begun."""
        slot, self.keeper.slot, self.keeper = self.keeper.slot, None, row
        assert slot is not None, "it is let go of when the last row begins"
        row.slot, slot.tokens = slot, slot.tokens[: len(self.prompt)]

    def free(self, row: TokenSequence) -> None:
        """Release the slot of a sequence that has finished, unless it keeps the prompt for sequences that have not begun."""
        waited_for = any(other.slot is None and not other.finished for other in self.rows)
        if row.finished and row.slot is not None and not (row is self.keeper and waited_for):
            row.slot.busy = False


def held(running: Sequence[Request]) -> Counter[tuple[Hashable, bool]]:
    """Number of sequences with a slot, by account."""
    return Counter(r.account for r in running for row in r.rows if row.slot is not None and row.slot.busy)


def in_turn(waiting: Sequence[Request], rows: Counter[tuple[Hashable, bool]]) -> list[Request]:
    """Accounts with the fewest rows first; at equal numbers chats before bulk runs, then by arrival."""
    return sorted(waiting, key=lambda r: (rows[r.account], r.request.bulk, r.arrived))


def may_begin(running: Request, rows: Counter[tuple[Hashable, bool]], most_rows: int) -> bool:
    """Whether one more sequence of this request leaves enough rows for others. `rows` are those held in its model."""
    free = most_rows - rows.total()
    if free <= 0:
        return False
    # Whatever their number, bulk runs leave a share of the rows to chats.
    if running.request.bulk and sum(n for (_, bulk), n in rows.items() if bulk) >= max(1, int(BULK_SHARE * most_rows)):
        return False
    return rows[running.account] < HELD_TO_FREE * free


def shares(needs: Sequence[tuple[Hashable, int]], budget: int) -> list[int]:
    """Prefill tokens of each request in a step: `budget` divided evenly among accounts, then among the requests of each; what one
    does not need goes to the others. The sum is the budget, or all that is needed."""
    wanted: Counter[Hashable] = Counter()
    for account, need in needs:
        wanted[account] += need
    given = dict(zip(wanted, _even(list(wanted.values()), budget), strict=True))
    found = [0] * len(needs)
    for account, amount in given.items():
        mine = [i for i, (whose, _) in enumerate(needs) if whose == account]
        for i, share in zip(mine, _even([needs[i][1] for i in mine], amount), strict=True):
            found[i] = share
    return found


def _even(needs: list[int], budget: int) -> list[int]:
    """Max-min fair shares: nobody gets more than it needs, and nobody who needs more gets less than another."""
    found, left = [0] * len(needs), budget
    order = sorted(range(len(needs)), key=needs.__getitem__)
    # Smallest needs first: what one leaves of its share goes to the rest.
    for done, i in enumerate(order):
        found[i] = min(needs[i], -(-left // (len(order) - done)))
        left -= found[i]
    return found
