"""Run one of our functions in a fork of this process, with limits on additional memory and CPU time.

A fork rather than a process of its own as in `app/kit/sandbox.py`, because what the function needs (transformers, which imports
torch) is loaded here already and takes seconds to import; and because its base memory differs between torch builds, so that only
the additional memory can be limited.
"""

from __future__ import annotations

import json
import os
import resource
import selectors
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from app.errors import BadData, StudioError
from app.kit.child_process import die_with_parent

_MAX_ANSWER_BYTES = 64 * 2**20
_WAY_OUT = "Fix the model, or choose another."


def limited(function: Callable[[], Any], what: str, seconds: int, memory_bytes: int) -> Any:
    """The result of `function()`, passed as JSON. `what` names what it opens, for error messages.

    It may take `seconds` of CPU time, four times as much wall-clock time, and `memory_bytes` beyond what this process has mapped.
    Raises BadData when it exceeds a limit, and re-raises our own exceptions.
    """
    reading, writing = os.pipe()
    die = die_with_parent()
    child = os.fork()
    if child == 0:
        os.close(reading)
        die()
        _run(function, writing, seconds, memory_bytes)
    os.close(writing)
    answer: bytes | None = None
    try:
        answer = _hear(reading, time.monotonic() + 4 * seconds)
    finally:
        os.close(reading)
        if answer is None:
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if answer is None or code == -signal.SIGXCPU:
        raise BadData(f"{what} took longer than {seconds} seconds of processor time.", hint=_WAY_OUT, code="out_of_time")
    if code != 0:
        raise BadData(
            f"{what} needed more than {memory_bytes / 2**30:.1f} GiB of memory, or the library that reads it broke down.",
            hint=_WAY_OUT,
            code="out_of_memory",
        )
    said = json.loads(answer)
    if "error" in said:
        raise BadData(said["error"], hint=said["hint"], code=said["code"])
    return said["result"]


def _hear(reading: int, deadline: float) -> bytes | None:
    """What the child writes until it closes its end; None when the deadline passes or it writes too much."""
    heard = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(reading, selectors.EVENT_READ)
        while len(heard) <= _MAX_ANSWER_BYTES and selector.select(max(0.0, deadline - time.monotonic())):
            piece = os.read(reading, 1 << 16)
            if not piece:
                return bytes(heard)
            heard += piece
    return None


# In the child -------------------------------------------------------------------------------------------------------


def _run(function: Callable[[], Any], writing: int, seconds: int, memory_bytes: int) -> NoReturn:
    """Runs in the child. Nothing of the parent's is cleaned up or flushed here: this process exits by itself, whatever happens."""
    code = 1
    try:
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        for what, most in ((resource.RLIMIT_AS, mapped + memory_bytes), (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_CORE, 0)):
            _, hard = resource.getrlimit(what)
            resource.setrlimit(what, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        try:
            said = {"result": function()}
        except StudioError as error:
            said = {"error": error.message, "hint": error.hint, "code": error.code}
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(json.dumps(said).encode())
        code = 0
    except MemoryError:
        pass
    except BaseException:  # the parent reports that it crashed; the log says how
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)
