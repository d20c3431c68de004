"""Where the code of Python graders runs: Monty, an interpreter in Rust that has no files, processes, network or environment.

Each grade is a session of its own in a process of a small pool, with limits on time, memory, recursion and calls to the host. The
functions of rapidfuzz are such calls: their time is the host's, so the length of their texts and their time together are limited too.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from app.graders._base import JSON, GradeError
from app.languages import gettext

if TYPE_CHECKING:
    from pydantic_monty import ExternalModule, Monty, MontySession

SECONDS = 1.0
MEMORY_BYTES = 64 << 20
RECURSION = 200
HOST_CALLS = 500
HOST_SECONDS = 2.0
HOST_CHARACTERS = 20_000
"""Of each text that a host function gets."""
PRINTED_BYTES = 64 << 10
PROCESSES = 2
WAIT_SECONDS = 30.0
TRIES = 3
AFRESH = 1000
"""Sessions after which a process is replaced."""

_FUZZ = (
    "ratio", "partial_ratio", "token_sort_ratio", "token_set_ratio", "token_ratio", "partial_token_sort_ratio", "partial_token_set_ratio",
    "partial_token_ratio", "WRatio", "QRatio",
)  # fmt: skip
_DISTANCES = ("Levenshtein", "DamerauLevenshtein", "Indel", "Jaro", "JaroWinkler", "LCSseq", "Hamming", "OSA", "Prefix", "Postfix")
_MEASURES = ("distance", "similarity", "normalized_distance", "normalized_similarity")

_pools: dict[int, Monty] = {}
"""The pool of this process, by its id: a forked child must not use its parent's."""
_lock = threading.Lock()


def _pool() -> Monty:
    from pydantic_monty import Monty

    with _lock:
        found = _pools.get(os.getpid())
        if found is None:
            found = Monty(max_processes=PROCESSES, checkout_timeout=WAIT_SECONDS, max_checkouts_per_worker=AFRESH).__enter__()
            _pools[os.getpid()] = found
            atexit.register(_close, os.getpid())
        return found


def _close(pid: int) -> None:
    if pid == os.getpid() and (found := _pools.pop(pid, None)) is not None:
        found.__exit__(None, None, None)


class NoProcess(GradeError):
    """The studio has no process for the code, which is no fault of the code."""


@contextlib.contextmanager
def session() -> Iterator[MontySession]:
    """A session with all limits and without anything of an earlier one. Raises NoProcess."""
    from pydantic_monty import MontyCrashedError

    for left in reversed(range(TRIES)):
        waiting = _checkout()
        try:
            running = waiting.__enter__()
            break
        except (MontyCrashedError, OSError) as error:  # a waiting process was killed, or took too long; the pool replaces it
            if not left:
                said = gettext("No process was free for the code: %(error)s", error=str(error)[:200])
                raise NoProcess("python_grader_server_error", said) from None
    try:
        yield running
    finally:
        with contextlib.suppress(MontyCrashedError):
            waiting.__exit__(None, None, None)


def _checkout() -> MontySession:
    return _pool().checkout(
        limits={
            "max_feed_duration_secs": SECONDS,
            "max_turn_duration_secs": SECONDS,
            "max_memory": MEMORY_BYTES,
            "max_recursion_depth": RECURSION,
            "max_suspensions": HOST_CALLS,
            "max_total_sleep_secs": 0.0,
        },
        script_name="grader.py",
        os_policy={"sleep": "zero", "random_start": {"seed": 0}},  # the same answer has the same grade
        external_modules={"rapidfuzz": lambda: _rapidfuzz(_Host())},
    )


def feed(running: MontySession, code: str, inputs: JSON | None = None) -> Any:
    """The value of a snippet. Raises GradeError."""
    from pydantic_monty import CollectString, MontyCrashedError, MontyError

    try:
        return running.feed_run(code, inputs=inputs, print_callback=CollectString(PRINTED_BYTES))
    except MontyCrashedError as error:
        said = gettext("The code was ended: %(error)s", error=str(error)[:200])
        raise GradeError("python_grader_server_error", said) from None
    except MontyError as error:
        raise GradeError("python_grader_runtime_error", said_of(error)) from None


def said_of(error: Any) -> str:
    """An error of the code, with its line."""
    frames = error.traceback() if hasattr(error, "traceback") else []
    text = str(error)[:400]
    return gettext("%(error)s (line %(line)s)", error=text, line=frames[-1].line) if frames else text


def run(source: str, sample: JSON, item: JSON) -> float:
    """What `grade(sample, item)` of the source returns. Raises GradeError."""
    with session() as running:
        feed(running, source)
        found = feed(running, "grade(sample, item)", {"sample": sample, "item": item})
    if not isinstance(found, int | float):
        said = gettext("grade returned %(type)s; it must return a number.", type=type(found).__name__)
        raise GradeError("python_grader_runtime_error", said)
    try:
        return float(found)
    except OverflowError:
        raise GradeError("python_grader_runtime_error", gettext("grade returned a number that is too large.")) from None


# What the code may call -------------------------------------------------------------------------------------------------


class _Host:
    """The budget of one session's calls to the host."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def function(self, name: str, call: Callable[..., Any], process: Callable[[str], str]) -> Callable[..., Any]:
        """A function of two texts, as the code sees it."""

        def limited(one: Any, other: Any, *, processor: Any = None, score_cutoff: Any = None) -> Any:
            if processor is not None and "default_process" not in str(processor):
                raise TypeError(f"{name} takes utils.default_process or None as its processor")
            texts = [_text(name, value) for value in (one, other)]
            if processor is not None:
                texts = [process(text) for text in texts]
            if self.seconds > HOST_SECONDS:
                raise TimeoutError(f"the calls of rapidfuzz took longer than {HOST_SECONDS:g} seconds together")
            cut = {"score_cutoff": score_cutoff} if isinstance(score_cutoff, int | float) else {}
            began = time.monotonic()
            try:
                return call(*texts, **cut)
            finally:
                self.seconds += time.monotonic() - began

        return limited


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} takes two texts, not {type(value).__name__}")
    if len(value) > HOST_CHARACTERS:
        raise ValueError(f"{name} takes texts of at most {HOST_CHARACTERS:,} characters")
    return value


def _rapidfuzz(host: _Host) -> ExternalModule:
    """`rapidfuzz`, as far as it compares two texts."""
    from pydantic_monty import ExternalModule
    from rapidfuzz import distance, fuzz, utils

    def made(prefix: str, module: Any, names: tuple[str, ...]) -> dict[str, Any]:
        return {name: host.function(f"{prefix}.{name}", getattr(module, name), utils.default_process) for name in names}

    measured = {
        name: ExternalModule(made(name, module, tuple(m for m in _MEASURES if hasattr(module, m))))
        for name in _DISTANCES
        if (module := getattr(distance, name, None)) is not None
    }
    return ExternalModule(
        {
            "fuzz": ExternalModule(made("fuzz", fuzz, _FUZZ)),
            "utils": ExternalModule({"default_process": lambda text: utils.default_process(_text("default_process", text))}),
            "distance": ExternalModule(measured),
        }
    )
