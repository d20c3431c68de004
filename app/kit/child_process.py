"""A process that works for this one: it is started, listened to, watched, and ended together with all that it started.

The trainer, an evaluation, a sandbox's child and pip are such processes. Each leads a session, and so a process group, of its own. It
is looked at without being reaped until its group has been killed: until then its number cannot become another process's.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from app.errors import Unavailable
from app.settings import PROJECT

LAUNCH = str(Path(__file__).with_name("launch.py"))
LAST_LINES_SECONDS = 10.0
"""How long the end waits for lines that are still in the pipe."""


class Child:
    """A process that was started by `start`. As a context manager it is ended at the end of the block."""

    def __init__(self, process: subprocess.Popen[bytes], pipe: int | None = None) -> None:
        self.process, self.pid = process, process.pid
        self._pipe = pipe
        self._reader: threading.Thread | None = None

    def listen(self, hear: Callable[[bytes], None], over: Callable[[], None] = lambda: None) -> None:
        """Hand each line of its pipe to `hear`, in a thread, until everyone who could write to it is gone; then call `over`."""
        assert self._pipe is not None, "it was started without a pipe"
        self._reader = threading.Thread(target=self._read, args=(self._pipe, hear, over), name="child", daemon=True)
        self._pipe = None  # the thread closes it
        self._reader.start()

    @staticmethod
    def _read(handle: int, hear: Callable[[bytes], None], over: Callable[[], None]) -> None:
        with os.fdopen(handle, "rb") as pipe:
            for line in pipe:
                hear(line)
        over()

    def is_running(self) -> bool:
        """Whether it has not ended. It is not reaped."""
        if self.process.returncode is not None:
            return False
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def ends_within(self, seconds: float) -> bool:
        """Wait for its end, but no longer than that. It is not reaped."""
        late = time.monotonic() + seconds
        while self.is_running():
            if time.monotonic() > late:
                return False
            time.sleep(0.02)
        return True

    def kill_group(self) -> None:
        """Kill it and all it started in its group. It has not been reaped, so the number is still its own."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)

    def end(self) -> int:
        """Kill what is left of it, reap it, and wait for the last lines of its pipe; its exit code, negative for a signal."""
        self.kill_group()
        code = self.process.wait()
        if self._reader is not None:
            self._reader.join(LAST_LINES_SECONDS)
        elif self._pipe is not None:
            os.close(self._pipe)
            self._pipe = None
        return code

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end()


def start(
    command: list[str] | Callable[[int], list[str]],
    *,
    env: Mapping[str, str],
    output: IO[bytes],
    cwd: Path | str = PROJECT,
    answers: bool = False,
    keeps: Sequence[int] = (),
) -> Child:
    """A child without input whose output and errors go to the file `output`.

    Where `command` is a function it is given the number of the writing end of a pipe that the child inherits; `Child.listen` reads the
    other end. It also inherits the open files `keeps`. With `answers` the child takes its orders on its standard input and answers on its standard output, and `output` gets its
    errors alone.
    """
    stream = subprocess.PIPE if answers else None
    reading = writing = None
    try:
        if callable(command):
            reading, writing = os.pipe()
            command = command(writing)
        process = subprocess.Popen(
            command,
            stdin=stream or subprocess.DEVNULL,
            stdout=stream or output,
            stderr=output,
            cwd=cwd,
            env=env,
            pass_fds=[*keeps, *([] if writing is None else [writing])],
            start_new_session=True,
        )
    except BaseException:
        if reading is not None:
            os.close(reading)
        raise
    finally:
        if writing is not None:
            os.close(writing)
    return Child(process, reading)


def run(command: list[str], environment: dict[str, str], poll: Callable[[], None], seconds: float) -> tuple[int, str]:
    """Exit status and output of a child that dies with this process. `poll` runs twice a second and may raise to stop it.

    Raises Unavailable when the child takes longer than `seconds`.
    """
    with tempfile.TemporaryFile() as output:
        with start(launched(command), env=environment, output=output) as child:
            late = time.monotonic() + seconds
            while not child.ends_within(0.5):
                if time.monotonic() > late:
                    raise Unavailable(f"A step took longer than {seconds:.0f} seconds and was stopped.", hint="Try again.")
                poll()
        output.seek(max(0, output.seek(0, os.SEEK_END) - 200_000))
        return child.end(), output.read().decode("utf-8", "replace")


# The death of the parent ----------------------------------------------------------------------------------------------


def launched(command: list[str], *, identity: str = "self", signal: int = 9) -> list[str]:
    """`command`, wrapped so that it runs as `identity` (see launch.py) and gets `signal` when this process dies."""
    return [sys.executable, "-I", "-S", LAUNCH, str(os.getpid()), str(signal), identity, *command]


def die_with_parent(parent: int | None = None) -> Callable[[], None]:
    """What a child runs between fork and exec, or after a fork: the kernel kills it when its parent dies.

    A parent that died before the call is noticed by the changed parent id. The library is loaded here, in the parent,
    because little may be done after a fork.
    """
    prctl, parent = ctypes.CDLL(None, use_errno=True).prctl, parent or os.getpid()

    def ask() -> None:
        prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)

    return ask
