"""The generation engine: continuous batching of many requests on one thread.

At every step each loaded model runs one flat row of tokens: the newest token of every sequence that is being generated, and a
bounded chunk of the prompts that are still in prefill. So a request joins as soon as its prompt is read and leaves when it ends,
a long prompt stalls nobody, and the weights are read once for all (Yu et al. 2022, Orca, OSDI; chunked prefill: Agrawal et al.
2024, Sarathi-Serve, https://arxiv.org/abs/2403.02310).

    caller's thread   answer(): load the model, render the prompt, enqueue it, and yield the entries that come back
    engine's thread   admit → step → sample → emit, for every loaded model in turn
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator

import torch

from app.errors import TooMany, Unavailable
from app.inference.protocol import AnswerStarted, Done, Entry, GenerateRequest, StreamError
from app.spec import ModelRef
from worker.data import answer_form
from worker.inference import answer_plan, constraint, emission, next_token, prompt_logprobs, scheduler
from worker.inference.errors import broke
from worker.inference.memory_budget import MemoryBudget
from worker.inference.model_pool import LoadedModel, ModelHandle, ModelPool
from worker.inference.next_token import NextTokenQuery
from worker.inference.request import render, room_for
from worker.inference.sampling import Detokenizer, Sampler, one_thread
from worker.inference.scheduler import Request, TokenSequence
from worker.modeling.kv_cache import ForwardPass, Segment, Slot
from worker.runtime import devices

MAX_ROWS = 16
"""Sequences generated at once in one loaded model."""
CHUNK = 64
"""Prefill tokens of one step while other sequences are decoding: it bounds how long these wait."""
LONE_CHUNK = 512
"""Prefill tokens of one step while nothing is decoding."""
GPU_TIMES = 8
"""A GPU reads this many times as many tokens in a step: it computes 512 in little more time than 64."""
REUSE = 16
"""A slot whose tokens share at least this long a prefix with a new prompt is reused from where they differ."""
WAIT_SECONDS = 60.0
"""A request that has not begun by then is refused as busy."""
PATIENCE_SECONDS = 10.0
"""A request that has waited this long for memory is not overtaken any more."""
MAX_OF_ONE = 24
"""Requests of one person in the engine, including waiting ones."""


def _slot(row: TokenSequence) -> Slot:
    assert row.slot is not None, "it is being written"
    return row.slot


class Engine:
    """Start one per process. `answer` may be called from any number of threads. `on_death` is called in the engine's thread when
    that ends with an exception no request is to blame for; all waiting callers have been sent an error by then."""

    def __init__(
        self,
        shelf: ModelPool | None = None,
        *,
        most_rows: int = MAX_ROWS,
        chunk: int | None = None,
        lone_chunk: int | None = None,
        wait_seconds: float = WAIT_SECONDS,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        self.shelf = shelf or ModelPool()
        self.room = MemoryBudget(self.shelf, most_rows)
        times = GPU_TIMES if devices.is_gpu(self.shelf.device) else 1
        self.chunk, self.lone_chunk = chunk or times * CHUNK, lone_chunk or times * LONE_CHUNK
        self.most_rows, self.wait_seconds = most_rows, wait_seconds
        self.on_death = on_death
        self.waiting: list[Request] = []
        self.active: list[Request] = []
        self.steps = 0
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._live, name="engine", daemon=True)
        self._thread.start()

    # The caller's side ------------------------------------------------------------------------------------------------

    def answer(self, request: GenerateRequest, poll_seconds: float = 0.25) -> Iterator[list[Entry]]:
        """Entries of one request as they come; an empty list every `poll_seconds` without any. Closing the iterator cancels the
        request.

        Raises StudioError before the first entry when the model or the prompt is invalid.
        """
        began = time.monotonic()
        self._refuse_too_many(request)
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

    def _refuse_too_many(self, request: GenerateRequest) -> None:
        with self._wake:
            mine = sum(r.request.owner == request.owner and not r.request.bulk for r in [*self.waiting, *self.active])
        if mine >= MAX_OF_ONE and not request.bulk:
            raise TooMany(
                f"{mine} of your questions are being answered or wait for it.",
                hint="Wait for some of them, or put several rows into one run.",
            )

    def _prepare(self, request: GenerateRequest, place: ModelHandle, began: float) -> tuple[Request, AnswerStarted]:
        lead = [0] * place.lane.lead
        context = place.lane.context - len(lead)
        text, ids = render(request, place.tokenizer, context)
        room = room_for(request, len(ids), context)
        sampling = request.sampling
        most = self.room.longest_answer(request, place.lane, len(lead) + len(ids), min(sampling.max_tokens or room, room))
        syntax = answer_plan.syntax_of(request, place.tokenizer, text)
        hidden = answer_form.hidden_tokens(place.tokenizer, syntax)
        rows = [
            TokenSequence(
                i,
                Sampler(sampling, request.seed + i, ids, constraint.of_request(request, syntax, place.tokenizer, place.stop_ids)),
                Detokenizer(place.tokenizer, ids, sampling.stop, hidden),
            )
            for i in range(sampling.n)
        ]
        running = Request(request, place, lead + ids, most, queue.SimpleQueue(), rows, began)
        context = place.lane.context
        return running, AnswerStarted(rendered_prompt=text, prompt_tokens=len(ids), max_tokens=most, context=context, syntax=syntax)

    def _entries(self, running: Request, poll_seconds: float) -> Iterator[list[Entry]]:
        while True:
            try:
                entries = running.out.get(timeout=poll_seconds)
            except queue.Empty:
                if not self._thread.is_alive():
                    raise Unavailable("The generation engine stopped.", hint="Try again in a moment.") from None
                yield []
                continue
            with contextlib.suppress(queue.Empty):  # what has gathered while the previous entries were being sent
                while True:
                    entries = entries + running.out.get_nowait()
            yield entries
            if entries and isinstance(entries[-1], Done | StreamError):
                return

    def _hand_over(self, running: Request) -> None:
        with self._wake:
            self.waiting.append(running)
            self._wake.notify()

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify()

    def close(self) -> None:
        """Stop the thread; running requests end with an error."""
        self._closed = True
        self._notify()
        self._thread.join(10)

    # The engine's side ------------------------------------------------------------------------------------------------

    def _live(self) -> None:
        """The engine's thread. When it ends, all callers get an error; the process may then be restarted."""
        died = False
        try:
            self._run()
        except BaseException:
            died = True
            traceback.print_exc()
        self._closed = True
        for running in [*self.active, *self.waiting]:
            running.out.put(
                [StreamError(status=503, code="unavailable", message="The generation engine stopped.", hint="Ask again in a moment.")]
            )
        if died:
            self.on_death()

    @torch.inference_mode()
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

    def _sweep(self) -> None:
        """End requests that were cancelled, ran out of time or have waited too long to begin."""
        now = time.monotonic()
        for running in [*self.active, *self.waiting]:
            if running.cancelled or (running.deadline is not None and now > running.deadline):
                running.log_stopped()
                entries: list[Entry] = []
                for row in running.rows:
                    if not row.finished:
                        emission.finish(running, row, "cancelled" if running.cancelled else "length", entries)
                self._leave(running, entries)
            elif running.deadline is None and now - running.arrived > (
                running.request.seconds if running.request.bulk else self.wait_seconds
            ):
                self._break([running], self._too_busy(running))

    def _too_busy(self, running: Request) -> Unavailable:
        rows = sum(row.slot is not None and row.slot.busy for r in self.active for row in r.rows)
        return Unavailable(
            f"{rows} answers are being written and {len(self.waiting)} questions wait; this one has waited for "
            f"{time.monotonic() - running.arrived:.0f} seconds.",
            hint="Try again in a moment, or ask for shorter or fewer answers at once.",
            code="busy",
        )

    def _admit(self) -> None:
        """Begin sequences, one at a time, in the order of `scheduler.in_turn`, while there are slots and memory."""
        passed: set[int] = set()
        while True:
            with self._wake:
                waiting = [r for r in [*self.waiting, *self.active] if id(r) not in passed and r.next_row() is not None]
            if not waiting:
                return
            best = scheduler.in_turn(waiting, scheduler.held(self.active))[0]
            passed.add(id(best))
            try:
                begun = self._begin(best)
            except Exception as error:
                self._break([best], error)
                continue
            if begun:
                passed.discard(id(best))
            elif begun is None and time.monotonic() - best.arrived > PATIENCE_SECONDS:
                return  # the next memory that is freed is for this request

    def _begin(self, running: Request) -> bool | None:
        """Give the next sequence of a request a slot. False when its share of the slots is used, None when there is no memory yet."""
        lane, row = running.place.lane, running.next_row()
        mine = [r for r in self.active if r.place.lane is lane]
        if row is None:
            return False
        if running.keeper.finished:  # the slot is handed on, so no further memory is needed
            assert running.first_logits is not None
            running.hand_on(row)
            self._choose(lane, running.first_logits[None], [(row, running, 0)])
            return True
        if not scheduler.may_begin(running, scheduler.held(mine), self.most_rows):
            return False
        if not self.room.promise(running, self.active):
            return None
        if row is not running.rows[0]:
            return self._begin_late(running, row)
        source = max(lane.cache.slots(), key=lambda slot: self._shared(slot, running), default=None)
        shared = self._shared(source, running) if source is not None else 0
        if shared < REUSE or running.request.look:  # prompt log-probabilities need the logits of every token
            shared, source = 0, None
        slot = self.room.take(lane, len(running.prompt) + 1, source)
        if slot is None:
            return None
        if source is not None and source is not slot:
            lane.cache.copy(source, slot, shared)
        slot.tokens, slot.owner, row.slot = slot.tokens[:shared], running.adapters, slot
        running.read = running.cached = shared
        running.deadline = time.monotonic() + running.request.seconds
        if lane.stack is not None:
            lane.stack.use(running.place.adapters, busy={key for r in mine for key in r.adapters})
        with self._wake:
            self.waiting.remove(running)
        self.active.append(running)
        return True

    def _begin_late(self, running: Request, row: TokenSequence) -> bool | None:
        """Begin a further sequence of a prompt that has been read."""
        lane, kept = running.place.lane, running.keeper.slot
        assert kept is not None and running.first_logits is not None
        slot = self.room.take(lane, len(running.prompt) + 1)
        if slot is None:
            return None
        lane.cache.copy(kept, slot, len(running.prompt))
        row.slot = slot
        self._choose(lane, running.first_logits[None], [(row, running, 0)])
        return True

    def _shared(self, slot: Slot, running: Request) -> int:
        """Length of the prefix of the prompt that an idle slot holds already, under the same adapters. At least one token is left
        to read."""
        if slot.busy or slot.owner != running.adapters:
            return 0
        most = min(len(slot.tokens), len(running.prompt) - 1)
        return next((i for i in range(most) if slot.tokens[i] != running.prompt[i]), most)

    # One step ---------------------------------------------------------------------------------------------------------

    def _step_or_break(self, lane: LoadedModel) -> None:
        mine = [r for r in self.active if r.place.lane is lane]
        try:
            for r in mine:
                if not self.room.make_longer(r):
                    self._break([r], MemoryError())
            self._step(lane, [r for r in mine if r in self.active])
        except Exception as error:
            self._break([r for r in mine if r in self.active], error)
            lane.cache.blocks = {}

    def _step(self, lane: LoadedModel, mine: list[Request]) -> None:
        # Decoding sequences come first in the flat row, ordered by slot, as `Step` expects.
        pairs = [(row, r) for r in mine for row in r.writing()]
        writing = sorted(pairs, key=lambda pair: (_slot(pair[0]).blocks.size, _slot(pair[0]).index))
        ids: list[int] = [row.written[-1] for row, _ in writing]
        decode = [Segment(_slot(row), i, 1, len(r.prompt) + len(row.written) - 1) for i, (row, r) in enumerate(writing)]
        positions = [s.past for s in decode]
        prefill, last, done, looked = [], list(range(len(decode))), [], []
        # Then a chunk of each prompt in prefill, oldest request first.
        reading = sorted((r for r in mine if not r.has_read), key=lambda r: r.arrived)
        needs = [(r.account, min(len(r.prompt) - r.read, prompt_logprobs.CHUNK if r.request.look else len(r.prompt))) for r in reading]
        for r, count in zip(reading, scheduler.shares(needs, self.chunk if decode else self.lone_chunk), strict=True):
            if not count:
                continue
            prefill.append((r, Segment(_slot(r.rows[0]), len(ids), count, r.read)))
            ids += r.prompt[r.read : r.read + count]
            positions += range(r.read, r.read + count)
            # Log-probabilities of a prompt need logits at all of its positions, an answer only those after its last
            # token.
            if r.request.look:
                looked.append((r, slice(len(last), len(last) + count)))
                last += range(len(ids) - count, len(ids))
            elif r.read + count == len(r.prompt):
                done.append((r, len(last)))
                last.append(len(ids) - 1)
        if not ids:
            return
        runs = [(1, r.adapters) for _, r in writing] + [(s.count, r.adapters) for r, s in prefill]
        step = ForwardPass(decode, [s for _, s in prefill], lane.device, lane.stack.select(runs) if lane.stack else None)
        logits = lane.forward(step, ids, positions, last or [0])
        self.steps += 1
        for row, _ in writing:
            _slot(row).tokens.append(row.written[-1])
        for r, segment in prefill:
            segment.slot.tokens += r.prompt[r.read : r.read + segment.count]
            r.read += segment.count
        for r, rows in looked:
            if (seen := prompt_logprobs.look(r, logits[rows])) is not None:
                self._leave(r, [seen])
        # The other sequences of the request begin from these logits.
        for r, i in done:
            r.first_logits = logits[i].clone() if len(r.rows) > 1 else None
        with one_thread(lane.device):
            self._choose(lane, logits, [(row, r, i) for i, (row, r) in enumerate(writing)] + [(r.rows[0], r, i) for r, i in done])

    def _choose(self, lane: LoadedModel, logits: torch.Tensor, writing: list[tuple[TokenSequence, Request, int]]) -> None:
        """Sample the next token of every sequence; `writing` are (sequence, its request, its row of `logits` (N, V)). An error of
        one sequence ends its request only."""
        if not writing:
            return
        said: dict[int, tuple[Request, list[Entry]]] = {}
        broken: dict[int, Request] = {}
        wanted = [NextTokenQuery(i, None if r.is_greedy else row.chooser, r.top_logprobs) for row, r, i in writing]
        for (row, r, _), options in zip(writing, next_token.options(logits, wanted), strict=True):
            if id(r) in broken:
                continue
            try:
                emission.choose(r, row, options, said.setdefault(id(r), (r, []))[1])
            except Exception as error:
                broken[id(r)] = r
                # NaN in the cache would reach the next owner of the slot.
                if options.likeliest is None:
                    for slot in (one.slot for one in r.rows if one.slot is not None):
                        lane.cache.wipe(slot)
                self._break([r], error)
        for r, entries in said.values():
            if id(r) in broken:
                continue
            if all(row.finished for row in r.rows):
                self._leave(r, entries)
            elif entries:
                r.out.put(entries)

    def _leave(self, running: Request, entries: list[Entry]) -> None:
        entries.append(emission.done(running))
        self._drop(running)
        running.out.put(entries)

    def _drop(self, running: Request) -> None:
        with self._wake:
            for group in (self.active, self.waiting):
                if running in group:
                    group.remove(running)
        for row in running.rows:
            if row.slot is not None:
                row.slot.busy = False
            row.finished = True

    def _break(self, broken: list[Request], error: Exception) -> None:
        """End these requests with an error; the engine and all other requests go on."""
        traceback.print_exc()
        for running in broken:
            self._drop(running)
            running.out.put([broke(error)])


def quick_request(model: ModelRef, sampling, *, prompt: str | None = None, messages: list | None = None, seed: int = 0) -> GenerateRequest:
    """A request created in this process, for benchmarks and tests."""
    return GenerateRequest(
        id=uuid.uuid4(), owner=uuid.UUID(int=0), model=model, prompt=prompt, messages=messages, sampling=sampling, seed=seed
    )
