"""The generation engine: one thread that answers many requests at once.

At every step each lane feeds one flat row of tokens: the newest token of every answer that is being written, and a
bounded chunk of the prompts that are still being read. So an answer joins as soon as its prompt is read and leaves when
it ends, a long prompt stalls nobody, and the weights are read once for all (Yu et al. 2022, "Orca"; Agrawal et al. 2024,
"Sarathi-Serve", for the chunks).

    caller's thread   answer(): load the model, render the prompt, hand it over, and yield what comes back
    engine's thread   admit → step → choose → give out, for every lane in turn
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from app.errors import StudioError, Unavailable
from app.generation import Broke, ChoiceFinished, Done, Entry, GenerateRequest, Logprob, SeenToken, Started, TextPart
from app.spec import ModelRef
from worker import looking
from worker.asking import render, room_for
from worker.cache import Segment, SlotCache, Step
from worker.lanes import Lane, Placement, Shelf
from worker.sampling import Chooser, TextStream, logprob

MOST_ROWS = 16
"""Answers written at once in one lane."""
CHUNK = 64
"""Prompt tokens read in one step while others are answering; nobody waits longer than this takes."""
LONE_CHUNK = 512
"""The same while nobody is."""
REUSE = 16
"""A slot that begins with at least this many tokens of a new prompt is taken up where they part."""


@dataclass(eq=False)
class Row:
    """One answer being written."""

    index: int
    chooser: Chooser
    text: TextStream
    slot: int = -1
    written: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    finished: bool = False


@dataclass(eq=False)
class Running:
    """One request in the engine. `read` prompt tokens are in the cache; its rows share them."""

    request: GenerateRequest
    place: Placement
    prompt: list[int]
    max_tokens: int
    deadline: float
    out: queue.SimpleQueue[list[Entry]]
    rows: list[Row]
    began: float
    read: int = 0
    cached: int = 0
    cancelled: bool = False
    seen: list[SeenToken] = field(default_factory=list)
    first_token: float | None = None
    arrived: float = field(default_factory=time.monotonic)

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(self.place.adapters)


class Engine:
    """Start one per process. `answer` may be called from any number of threads."""

    def __init__(self, shelf: Shelf | None = None, *, most_rows: int = MOST_ROWS, chunk: int = CHUNK, lone_chunk: int = LONE_CHUNK) -> None:
        self.shelf = shelf or Shelf()
        self.most_rows, self.chunk, self.lone_chunk = most_rows, chunk, lone_chunk
        self.waiting: list[Running] = []
        self.active: list[Running] = []
        self.steps = 0
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # The caller's side ------------------------------------------------------------------------------------------------

    def answer(self, request: GenerateRequest, poll_seconds: float = 0.25) -> Iterator[list[Entry]]:
        """Entries of one request as they come; an empty list each `poll_seconds` without any. Closing it stops the request.

        Raises StudioError before the first entry when the model or the prompt is not right.
        """
        began = time.monotonic()
        place = self.shelf.place(request.model)
        try:
            running, started = self._prepare(request, place, began)
            yield [started]
            self._hand_over(running)
            try:
                yield from self._entries(running, poll_seconds)
            finally:
                running.cancelled = True
                self._notify()
        finally:
            self.shelf.release(place.lane)

    def _prepare(self, request: GenerateRequest, place: Placement, began: float) -> tuple[Running, Started]:
        text, ids = render(request, place.tokenizer)
        lead = [0] * place.lane.lead
        room = room_for(request, len(ids), place.lane.context - len(lead))
        sampling = request.sampling
        most = min(sampling.max_tokens or room, room)
        rows = [
            Row(i, Chooser(sampling, request.seed + i, ids), TextStream(place.tokenizer, ids, sampling.stop)) for i in range(sampling.n)
        ]
        running = Running(request, place, lead + ids, most, began + request.seconds, queue.SimpleQueue(), rows, began)
        return running, Started(rendered_prompt=text, prompt_tokens=len(ids), max_tokens=most, context=place.lane.context)

    def _entries(self, running: Running, poll_seconds: float) -> Iterator[list[Entry]]:
        while True:
            try:
                entries = running.out.get(timeout=poll_seconds)
            except queue.Empty:
                if not self._thread.is_alive():
                    raise Unavailable("The generation engine stopped.", way_out="Try again in a moment.") from None
                yield []
                continue
            with contextlib.suppress(queue.Empty):  # what has gathered while the last entries were being sent
                while True:
                    entries = entries + running.out.get_nowait()
            yield entries
            if entries and isinstance(entries[-1], Done | Broke):
                return

    def _hand_over(self, running: Running) -> None:
        with self._wake:
            self.waiting.append(running)
            self._wake.notify()

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify()

    def close(self) -> None:
        """Stop the thread; what is running ends with an error."""
        self._closed = True
        self._notify()
        self._thread.join(10)

    # The engine's side ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closed:
            with self._wake:
                while not (self.waiting or self.active or self._closed):
                    self._wake.wait()
            self._sweep()
            self._admit()
            for lane in {id(r.place.lane): r.place.lane for r in self.active}.values():
                self._step_or_break(lane)
            if self.waiting and not self.active:
                time.sleep(0.002)
        for running in [*self.active, *self.waiting]:
            running.out.put([Broke(status=503, code="unavailable", message="The generation engine was stopped.")])

    def _sweep(self) -> None:
        """Let go of requests that were cancelled or ran out of time."""
        now = time.monotonic()
        for running in [r for r in [*self.active, *self.waiting] if r.cancelled or now > r.deadline]:
            entries: list[Entry] = []
            for row in running.rows:
                if not row.finished:
                    self._finish(running, row, "cancelled" if running.cancelled else "length", entries)
            self._leave(running, entries)

    def _admit(self) -> None:
        """Take requests in, those first whose owner has the fewest answers being written, then by arrival."""
        with self._wake:
            waiting = list(self.waiting)
        while waiting:
            busy = Counter(r.request.owner for r in self.active for _ in r.rows)
            best = min(waiting, key=lambda r: (busy[r.request.owner], r.arrived))
            waiting.remove(best)
            try:
                admitted = self._take_slots(best)
            except Exception as error:
                self._break([best], error)
                continue
            if admitted:
                with self._wake:
                    self.waiting.remove(best)
                self.active.append(best)

    def _take_slots(self, running: Running) -> bool:
        """Slots for all rows of a request, if they and the memory for them are free."""
        lane, count = running.place.lane, len(running.rows)
        mine = [r for r in self.active if r.place.lane is lane]
        taken = {row.slot for r in mine for row in r.rows}
        if len(taken) + count > max(self.most_rows, count):
            return False
        if not self._make_room(lane, running, taken):
            return False
        cache = lane.cache
        free = [s for s in range(cache.slots) if s not in taken]
        shared, first = max((self._shared(cache, s, running), -s) for s in free)
        first = -first
        if shared < REUSE or running.request.look:  # who looks at every token must read every token
            shared, first = 0, min(free, key=lambda s: (len(cache.tokens[s]), s))
        running.read = running.cached = shared
        slots = [first, *[s for s in free if s != first][: count - 1]]
        for row, slot in zip(running.rows, slots, strict=True):
            row.slot = slot
        cache.tokens[first] = cache.tokens[first][:shared]
        cache.owner[first] = running.adapters
        for slot in slots[1:]:
            cache.tokens[slot] = []
        self._take_adapters(lane, running, mine)
        return True

    def _shared(self, cache: SlotCache, slot: int, running: Running) -> int:
        """How many tokens of the prompt a free slot holds already, under the same adapters. One is always left to read."""
        if cache.owner[slot] != running.adapters:
            return 0
        most = min(len(cache.tokens[slot]), len(running.prompt) - 1)
        return next((i for i in range(most) if cache.tokens[slot][i] != running.prompt[i]), most)

    def _make_room(self, lane: Lane, running: Running, taken: set[int]) -> bool:
        cache, count = lane.cache, len(running.rows)
        slots = cache.slots
        while slots < len(taken) + count:
            slots = min(slots * 2, max(self.most_rows, len(taken) + count))
        need = len(running.prompt) + running.max_tokens
        capacity = cache.capacity
        while capacity < need:
            capacity *= 2
        capacity = min(capacity, max(lane.context, cache.capacity))
        if (slots, capacity) == (cache.slots, cache.capacity):
            return True
        more = slots * capacity * lane.bytes_per_token - cache.nbytes()
        if more > 0 and self.shelf.memory() + more > self.shelf.memory_bytes:
            if taken:
                return False  # it waits until a neighbour leaves
            lane.cache = SlotCache(count, min(lane.context, -(-need // 64) * 64))
            return True
        cache.grow(slots, capacity)
        return True

    def _take_adapters(self, lane: Lane, running: Running, others: list[Running]) -> None:
        busy = {key for r in others for key in r.adapters} | set(running.adapters)
        for key, weights in running.place.adapters.items():
            assert lane.stack is not None, "only a base's lane has adapters in its stack"
            if key in lane.stack.loaded:
                lane.stack.touch(key)
            else:
                lane.stack.add(key, weights, busy)

    # One step ---------------------------------------------------------------------------------------------------------

    def _step_or_break(self, lane: Lane) -> None:
        mine = [r for r in self.active if r.place.lane is lane]
        try:
            self._step(lane, mine)
        except Exception as error:
            lane.cache = SlotCache(1, 512)
            self._break(mine, error)

    @torch.inference_mode()
    def _step(self, lane: Lane, mine: list[Running]) -> None:
        writing = sorted(
            ((row, r) for r in mine if r.read == len(r.prompt) for row in r.rows if not row.finished), key=lambda pair: pair[0].slot
        )
        ids: list[int] = [row.written[-1] for row, _ in writing]
        decode = [Segment(row.slot, i, 1, len(r.prompt) + len(row.written) - 1) for i, (row, r) in enumerate(writing)]
        positions = [s.past for s in decode]
        prefill, last, done, looked = [], list(range(len(decode))), [], []
        budget = self.chunk if decode else self.lone_chunk
        for r in sorted((r for r in mine if r.read < len(r.prompt)), key=lambda r: r.arrived):
            count = min(budget, len(r.prompt) - r.read, looking.CHUNK if r.request.look else budget)
            if count <= 0:
                break
            prefill.append((r, Segment(r.rows[0].slot, len(ids), count, r.read)))
            ids += r.prompt[r.read : r.read + count]
            positions += range(r.read, r.read + count)
            budget -= count
            if r.request.look:
                looked.append((r, slice(len(last), len(last) + count)))
                last += range(len(ids) - count, len(ids))
            elif r.read + count == len(r.prompt):
                done.append((r, len(last)))
                last.append(len(ids) - 1)
        runs = [(1, r.adapters) for _, r in writing] + [(s.count, r.adapters) for r, s in prefill]
        step = Step(lane.cache, decode, [s for _, s in prefill], lane.device, lane.stack.select(runs) if lane.stack else None)
        logits = lane.forward(step, ids, positions, last or [0])
        self.steps += 1
        for row, _ in writing:
            lane.cache.tokens[row.slot].append(row.written[-1])
        for r, segment in prefill:
            lane.cache.tokens[segment.slot] += r.prompt[r.read : r.read + segment.count]
            r.read += segment.count
        for r, rows in looked:
            if (seen := looking.look(r, logits[rows])) is not None:
                self._leave(r, [seen])
        self._choose(lane, logits, [(row, r, i) for i, (row, r) in enumerate(writing)], done)

    def _choose(self, lane: Lane, logits: torch.Tensor, writing: list[tuple[Row, Running, int]], done: list[tuple[Running, int]]) -> None:
        """The next token of every answer, and of every answer whose prompt was just read."""
        for r, i in done:
            for row in r.rows[1:]:
                lane.cache.fork(r.rows[0].slot, row.slot)
                lane.cache.owner[row.slot] = r.adapters
            writing += [(row, r, i) for row in r.rows]
        if not writing:
            return
        likeliest = logits.argmax(-1).tolist()
        said: dict[int, tuple[Running, list[Entry]]] = {}
        for row, r, i in writing:
            sampling = r.request.sampling
            token = likeliest[i] if _is_greedy(r) else row.chooser.choose(logits[i])
            if sampling.logprobs:
                row.logprobs.append(logprob(r.place.tokenizer, logits[i], token, sampling.top_logprobs))
            self._accept(r, row, token, said.setdefault(id(r), (r, []))[1])
        for r, entries in said.values():
            if all(row.finished for row in r.rows):
                self._leave(r, entries)
            elif entries:
                r.out.put(entries)

    def _accept(self, running: Running, row: Row, token: int, entries: list[Entry]) -> None:
        """Add a token to an answer: show what may be shown, and end it when it is over."""
        running.first_token = running.first_token or time.monotonic()
        row.written.append(token)
        if token in running.place.stop_ids:
            if row.logprobs:
                row.logprobs.pop()  # the token that ends an answer is not part of it
            return self._finish(running, row, "stop", entries)
        text = row.text.push(token)
        if row.text.stopped:
            self._show(row, text, entries)
            return self._finish(running, row, "stop", entries)
        if text:
            self._show(row, text, entries)
        if len(row.written) >= running.max_tokens:
            self._finish(running, row, "length", entries)
        return None

    def _show(self, row: Row, text: str, entries: list[Entry]) -> None:
        if text or row.logprobs:
            entries.append(TextPart(index=row.index, text=text, logprobs=row.logprobs))
            row.logprobs = []

    def _finish(self, running: Running, row: Row, reason: str, entries: list[Entry]) -> None:
        self._show(row, row.text.end(), entries)
        row.finished = True
        entries.append(ChoiceFinished(index=row.index, reason=reason, tokens=len(row.written)))

    def _leave(self, running: Running, entries: list[Entry]) -> None:
        now, written = time.monotonic(), sum(len(row.written) for row in running.rows)
        first, speed = running.first_token, None
        if first is not None and written > len(running.rows):
            speed = (written - len(running.rows)) / max(now - first, 1e-9)
        entries.append(
            Done(
                prompt_tokens=len(running.prompt) - running.place.lane.lead,
                cached_tokens=running.cached,
                completion_tokens=written,
                first_token_seconds=None if first is None else first - running.began,
                tokens_per_second=speed,
            )
        )
        self._drop(running)
        running.out.put(entries)

    def _drop(self, running: Running) -> None:
        with self._wake:
            for group in (self.active, self.waiting):
                if running in group:
                    group.remove(running)

    def _break(self, broken: list[Running], error: Exception) -> None:
        """One fault must not take the others with it: these requests end with an error, the engine goes on."""
        traceback.print_exc()
        for running in broken:
            self._drop(running)
            running.out.put([broke(error)])


def _is_greedy(running: Running) -> bool:
    s = running.request.sampling
    return s.temperature == 0 and s.repetition_penalty == 1 and not (s.frequency_penalty or s.presence_penalty or s.logit_bias)


def broke(error: BaseException) -> Broke:
    """An error in the stream's own form. What is not ours is not shown in full: its text may hold paths."""
    if isinstance(error, StudioError):
        return Broke(
            status=error.status, code=error.code, error_type=error.type, message=error.message, way_out=error.way_out, param=error.param
        )
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "alloc" in str(error):
        return Broke(status=503, code="out_of_memory", message="The machine ran out of memory.", way_out="Shorten the prompt or try again.")
    return Broke(status=500, code="internal_error", message=f"The model failed while answering ({type(error).__name__}).")


def quick_request(model: ModelRef, sampling, *, prompt: str | None = None, messages: list | None = None, seed: int = 0) -> GenerateRequest:
    """A request of this process, for benchmarks and tests."""
    return GenerateRequest(
        id=uuid.uuid4(), owner=uuid.UUID(int=0), model=model, prompt=prompt, messages=messages, sampling=sampling, seed=seed
    )
