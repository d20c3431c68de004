"""Parts of a pack on parallel threads: how a CPU computes a training step, and scores packs.

Threads that share one product synchronize thousands of times per step. Sleeping while they wait wastes the cores where they are
slow to wake, as in a virtual machine; spinning takes the cores from everything else. Parts of a pack wait for nothing until their
gradients are added. (Data parallelism, as in Goyal et al. 2017, https://arxiv.org/abs/1706.02677, section 3, within one process,
so that the weights are in memory once.)

Sums do not depend on which thread was faster: every parameter takes the gradient of the first part first. So a step is bitwise
reproducible, and an interrupted job continues exactly.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Given = TypeVar("Given")
Got = TypeVar("Got")


class ThreadParallel:
    """Threads that divide `threads`, those of the process's products, evenly among themselves. They are started when needed."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._pool: ThreadPoolExecutor | None = None
        self._here = threading.local()  # .place: which of the parts this thread computes; .threads: threads of its products
        self._turn = threading.Condition()
        # By parameter, or a slice of one: how many parts, from the first, have added to it or had nothing to add.
        self._added: dict[Hashable, int] = {}
        self._ended: set[int] = set()

    def map(self, action: Callable[[Given], Got], given: Sequence[Given]) -> list[Got]:
        """`action` of everything in `given`, at most `threads` of them, in order; gradients are enabled in it as they are here.

        Raises the exception of the first that failed, when all have ended.
        """
        if len(given) > self.threads:
            raise ValueError(f"{len(given)} parts for {self.threads} threads")
        if len(given) < 2:
            return [action(one) for one in given]
        self._pool = self._pool or ThreadPoolExecutor(self.threads, "part")
        self._added.clear()
        self._ended.clear()
        each, learns = self.threads // len(given), torch.is_grad_enabled()
        running = [self._pool.submit(self._compute, action, place, one, each, learns) for place, one in enumerate(given)]
        failed = [error for one in running if (error := one.exception())]
        torch.set_num_threads(self.threads)  # threads started later begin with this thread's number
        if failed:
            raise failed[0]
        return [one.result() for one in running]

    def _compute(self, action: Callable[[Given], Got], place: int, given: Given, threads: int, learns: bool) -> Got:
        self._here.place = place
        if getattr(self._here, "threads", None) != threads:
            torch.set_num_threads(threads)
            self._here.threads = threads
        try:
            with torch.set_grad_enabled(learns):
                return action(given)
        finally:
            with self._turn:
                self._ended.add(place)
                self._turn.notify_all()

    @contextlib.contextmanager
    def in_order(self, parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
        """Within this context each of the parameters takes the gradients of the parts of one `map` in the parts' order."""
        hooks = []
        for parameter in parameters:
            key = id(parameter)
            hooks.append(parameter.register_hook(lambda _, key=key: self._wait(key)))
            hooks.append(parameter.register_post_accumulate_grad_hook(lambda _, key=key: self._pass_on(key)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextlib.contextmanager
    def turn(self, key: Hashable) -> Iterator[None]:
        """Within this context, this thread's part adds to what `key` stands for; waits until the parts before it have, or have ended."""
        self._wait(key)
        yield
        self._pass_on(key)

    def has_turn(self, key: Hashable) -> bool:
        """Whether `turn` would not wait. A part that ended without getting there is skipped."""
        place = self.place()
        return self._added.get(key, 0) >= place or all(p < self._added.get(key, 0) or p in self._ended for p in range(place))

    def place(self) -> int:
        """The index of the part that this thread computes."""
        return getattr(self._here, "place", 0)

    def _wait(self, key: Hashable) -> None:
        if not self.has_turn(key):
            with self._turn:
                self._turn.wait_for(lambda: self.has_turn(key))

    def _pass_on(self, key: Hashable) -> None:
        place = getattr(self._here, "place", None)
        if place is not None:
            with self._turn:
                self._added[key] = place + 1
                self._turn.notify_all()
