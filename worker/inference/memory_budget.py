"""Admission control: the KV cache that a request may need is reserved before it begins, and allocated in blocks as it grows.

So a request that has begun can always be finished, one that could never fit is refused with the numbers, and a chat takes the
memory of the tokens it has, not of its maximum length.
"""

from __future__ import annotations

from collections.abc import Sequence

from app.errors import DoesNotFit
from app.inference.protocol import GenerateRequest
from worker.inference.model_pool import LoadedModel, ModelPool
from worker.inference.scheduler import Request
from worker.modeling.kv_cache import Slot

MIN_ANSWER = 64
"""Tokens reserved at least for an answer of unspecified length."""


class MemoryBudget:
    """Grants memory to the engine. Used by the engine's thread only, except `longest_answer`."""

    def __init__(self, shelf: ModelPool, most_rows: int) -> None:
        self.shelf, self.most_rows = shelf, most_rows

    def longest_answer(self, request: GenerateRequest, lane: LoadedModel, prompt: int, most: int) -> int:
        """Maximum number of tokens of the answer: `most`, or where the request sets no limit, what there is memory for. Raises
        DoesNotFit when the cache of one such answer does not fit even alone, Unavailable when it would once a training job has
        ended."""
        name, cache = request.model.name, lane.cache
        free = self.shelf.limit() - self.shelf.weights_of(lane)
        while (need := cache.bytes_for(prompt + most)) > free:
            if request.sampling.max_tokens is None and most > MIN_ANSWER:
                most = max(most // 2, MIN_ANSWER)
                continue
            if need <= self.shelf.memory_bytes - self.shelf.weights_of(lane):
                raise self.shelf.training_needs_it(name)
            raise DoesNotFit(
                f"A prompt of {prompt} tokens with an answer of up to {most} needs {need / 2**20:,.1f} MiB in addition to the weights of "
                f"{name}, and the playground has {max(free, 0) / 2**20:,.1f} MiB for it.",
                hint="Ask for fewer tokens, shorten the prompt, or raise LUTHIER_GENERATE_MEMORY_BYTES.",
                param="max_tokens",
            )
        return most

    def promise(self, running: Request, active: Sequence[Request]) -> bool:
        """Whether one more sequence of this request can be finished together with all running ones."""
        promised = running.place.lane.cache.bytes_for(len(running.prompt) + running.max_tokens)
        for r in active:
            cache = r.place.lane.cache
            whole = cache.bytes_for(len(r.prompt) + r.max_tokens)
            promised += sum(
                whole - row.slot.blocks.size * cache.bytes_per_token for row in r.rows if row.slot is not None and row.slot.busy
            )
        lanes = {id(r.place.lane): r.place.lane for r in [*active, running]}.values()
        more = promised - sum(lane.cache.idle_bytes() for lane in lanes)  # idle slots are reused or freed
        self.shelf.fit(more)
        return self.shelf.memory() + more <= self.shelf.limit()

    def take(self, lane: LoadedModel, tokens: int, wanted: Slot | None = None) -> Slot | None:
        """A slot for this many tokens, `wanted` if it is large enough; None when there is no memory for one."""
        cache, size = lane.cache, lane.cache.size_for(tokens)
        slot = wanted if wanted is not None and wanted.blocks.size >= size else cache.idle(size)
        if slot is None:
            has = len(cache.blocks[size].slots) if size in cache.blocks else 0
            for count in (max(1, min(has, self.most_rows - has)), 1):
                if self._there_is(count * size * cache.bytes_per_token):
                    cache.grow(size, count)
                    break
            slot = cache.idle(size)
        if slot is not None:
            slot.busy = True
        return slot

    def make_longer(self, running: Request) -> bool:
        """Move sequences whose slots are full to larger ones; False when there is no memory for that."""
        lane = running.place.lane
        for row in running.writing():
            slot, length = row.slot, len(running.prompt) + len(row.written)
            assert slot is not None, "a row that is being written has one"
            if length > slot.blocks.size:
                larger = self.take(lane, length)
                if larger is None:
                    return False
                lane.cache.copy(slot, larger, len(slot.tokens))
                row.slot, slot.busy, slot.tokens = larger, False, []
        return True

    def _there_is(self, more: int) -> bool:
        """Whether this many bytes are available. Memory that training jobs claimed meanwhile is not counted against sequences
        that have begun."""
        if self.shelf.memory() + more > self.shelf.memory_bytes:
            self.shelf.trim()
            self.shelf.fit(more)
        return self.shelf.memory() + more <= self.shelf.memory_bytes
