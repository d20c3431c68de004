"""Processes forked from one that has imported torch and transformers already, for tests that start many: an import takes seconds.

What a new process does before its `main`, the walls around it among that, is looked at by the tests that start one as the studio does.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

import psutil
import pytest

from app.kit import child_process
from app.settings import PROJECT

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "worker.run",
        "worker.train",
        "worker.training.objectives.causal_lm",
        "worker.modeling.fused_lora",
        "worker.conversion.convert",
        "worker.conversion.merge",
        "worker.evaluation.process",
        "peft",
        "pyarrow.parquet",
        "scipy.stats",
        "tests.worker.orders",
    ]
)


# What brings models in --------------------------------------------------------------------------------------------------


@pytest.fixture
def warm_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """The children that bring in, examine and merge models are forked."""
    from app.models import starters

    monkeypatch.setattr(starters, "confined", lambda command, room: command)
    monkeypatch.setattr(child_process, "run", _run)


def _run(command: list[str], environment: dict[str, str], beat: Callable[[], None], seconds: float) -> tuple[int, str]:
    module, *arguments = command[command.index("-m") + 1 :]
    with tempfile.NamedTemporaryFile() as output:
        process = FORKS.Process(target=_main, args=(module, arguments, environment, output.name), daemon=True)
        process.start()
        late = time.monotonic() + seconds
        while process.is_alive():
            assert time.monotonic() < late, f"{module} takes too long"
            beat()
            process.join(0.5)
        return process.exitcode or 0, Path(output.name).read_text(errors="replace")


def _main(module: str, arguments: list[str], environment: dict[str, str], output: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    out = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    importlib.import_module(module).main(arguments)


# What trains and evaluates ----------------------------------------------------------------------------------------------

FORKED = ("worker.run", "worker.evaluation.process")
_running: dict[int, tuple[str, WarmChild]] = {}


@pytest.fixture
def warm_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainers and evaluations that this process supervises are forked, and have no walls around them."""
    whole = child_process.start

    def start(command: Any, *, env: Any, output: Any, cwd: Any = PROJECT, **more: Any) -> child_process.Child:
        planned = command(-1) if callable(command) else []  # the number of its pipe is known when it runs
        found = [at for at, word in enumerate(planned) if word in FORKED and planned[at - 1] == "-m"]
        return (
            WarmChild(planned[found[0] :], dict(env), output, more.get("keeps", ()))
            if found
            else whole(command, env=env, output=output, cwd=cwd, **more)
        )

    monkeypatch.setattr(child_process, "start", start)


def alive(*modules: str) -> list[psutil.Process]:
    """The forked trainers or evaluations that run: their command lines are those of what they were forked from."""
    return [psutil.Process(pid) for pid, (module, child) in list(_running.items()) if module in modules and child.is_running()]


class WarmChild(child_process.Child):
    """A child of this module's, looked after as one that `child_process.start` has started."""

    def __init__(self, command: list[str], environment: dict[str, str], output: Any, keeps: Any = ()) -> None:
        reading, writing = os.pipe()
        inherited = _Descriptors(writing, output.fileno(), *keeps)
        self._forked = FORKS.Process(target=_attempt, args=(command, environment, inherited, list(keeps)), daemon=True)
        self._looking = threading.Lock()
        self._forked.start()
        os.close(writing)
        assert self._forked.pid is not None
        self.pid, self._pipe, self._reader = self._forked.pid, reading, None
        _running[self.pid] = command[0], self

    def is_running(self) -> bool:
        with self._looking:
            return self._forked.exitcode is None

    def kill_group(self) -> None:
        if self.is_running():
            for kill in (os.killpg, os.kill):  # it may not lead a group yet
                with contextlib.suppress(ProcessLookupError):
                    kill(self.pid, signal.SIGKILL)

    def end(self) -> int:
        self.kill_group()
        while self.is_running():
            time.sleep(0.01)
        _running.pop(self.pid, None)
        if self._reader is not None:
            self._reader.join(child_process.LAST_LINES_SECONDS)
        elif self._pipe is not None:
            os.close(self._pipe)
            self._pipe = None
        return self._forked.exitcode or 0


class _Descriptors:
    """Of a pipe and a file; as an argument of a process they become that process's own."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = numbers

    def __reduce__(self) -> tuple[Any, ...]:
        return _duplicated, tuple(DupFd(number) for number in self.numbers)


def _duplicated(*numbers: Any) -> _Descriptors:
    return _Descriptors(*(number.detach() for number in numbers))


def _attempt(command: list[str], environment: dict[str, str], descriptors: _Descriptors, keeps: list[int]) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    pipe, out, *kept = descriptors.numbers
    os.dup2(out, 1)
    os.dup2(out, 2)
    module, *arguments = command
    arguments[arguments.index("--events-fd") + 1] = str(pipe)
    for option in ("--questions-fd", "--answers-fd"):
        if option in arguments:
            place = arguments.index(option) + 1
            arguments[place] = str(kept[keeps.index(int(arguments[place]))])
    from app.settings import get_settings

    get_settings.cache_clear()
    sys.exit(importlib.import_module(module).main(arguments))
