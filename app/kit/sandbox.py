"""Runs one of our functions on untrusted bytes in a short-lived child with limits.

    run("app.datasets.ingest:read", {…}, Limits(…), on_message=…)

The child starts within `app.kit.confinement`, sets its own limits before it imports anything else, sees an almost empty
environment, a temporary folder of its own and the files that it was given. It writes JSON lines to its standard output: any
number of messages, then its use (`{"peak_bytes", "cpu_seconds"}`) and that its result is in a file of its folder, or one error. A
child that exceeds memory or time, or crashes, becomes a `Killed` that says which; the caller is never harmed.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import resource
import selectors
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Protocol, cast

from app.kit import child_process
from app.kit.confinement import Confinement, confined
from app.settings import PROJECT

Message = dict[str, Any]
Say = Callable[[Message], None]

MAX_MESSAGE_BYTES = 4 << 20
MAX_RESULT_BYTES = 256 << 20
"""A result is passed as a file, not as a line: one row of maximum size, every character of it escaped, fits."""
_RESULT = "result.json"
_OUT_OF_MEMORY, _OUT_OF_TIME, _FILE_TOO_LARGE, _CRASHED = "out_of_memory", "out_of_time", "file_too_large", "crashed"


@dataclass(frozen=True)
class Limits:
    """Limits of the child, in bytes and seconds; `seconds` is wall clock, `cpu_seconds` counts all its threads."""

    memory_bytes: int = 2 << 30
    cpu_seconds: int = 3600
    seconds: float = 7200.0
    file_bytes: int = 64 << 30
    open_files: int = 64


class Killed(Exception):
    """The child did not finish. `kind` is out_of_memory, out_of_time, file_too_large, crashed or stopped."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message


class Refused(Exception):
    """The function in the child raised a StudioError with this `message`, `hint` and `code`."""

    def __init__(self, error: Message) -> None:
        super().__init__(error.get("message", ""))
        self.error = error


def run(
    function: str,
    payload: Message,
    limits: Limits | None = None,
    *,
    folder: Path,
    read: Iterable[Path | str] = (),
    write: Iterable[Path | str] = (),
    on_message: Callable[[Message], None] = lambda message: None,
    keep_going: Callable[[], bool] = lambda: True,
) -> Any:
    """The result of `module:function(payload, say)` run in a child whose temporary folder is created in `folder`. It also sees
    the files and folders of `read`, and those of `write`, which it may change; nothing else of the data folder.

    `on_message` gets the child's messages; `keep_going` is called about once a second, and False ends the child. Raises Refused
    or Killed.
    """
    limits = limits or Limits()
    with tempfile.TemporaryDirectory(prefix="child-", dir=folder) as own, tempfile.TemporaryFile(dir=own) as stderr:
        room = Confinement(read=[Path(path) for path in read], write=[Path(own), *(Path(path) for path in write)])
        command = confined([sys.executable, "-m", "app.kit.sandbox", function], room)
        with child_process.start(command, cwd=own, env=_environment(own), output=stderr, answers=True) as child:
            process = child.process
            with contextlib.suppress(BrokenPipeError):
                assert process.stdin is not None
                process.stdin.write(json.dumps({"limits": asdict(limits), "payload": payload}).encode())
                process.stdin.close()
            outcome = _listen(process, limits, on_message, keep_going)
            code = process.wait(timeout=30)
        return _judge(outcome, code, limits, stderr, Path(own))


def _environment(folder: str) -> dict[str, str]:
    """A minimal environment for Python. One malloc arena and few threads keep the address space small."""
    project = str(PROJECT)
    return {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": project,
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": folder,
        "TMPDIR": folder,
        "LANG": "C.UTF-8",
        "MALLOC_ARENA_MAX": "2",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "RAYON_NUM_THREADS": "2",
        "TOKENIZERS_PARALLELISM": "true",
        "ARROW_DEFAULT_MEMORY_POOL": "system",
        "HF_HUB_OFFLINE": "1",
        **{name: os.environ[name] for name in ("LUTHIER_STUDIO",) if name in os.environ},  # by which the warden finds it
    }


def _listen(process: subprocess.Popen[bytes], limits: Limits, on_message: Say, keep_going: Callable[[], bool]) -> Message | None:
    """Pass on the child's messages until it closes its pipe; its last line is the outcome. Raises Killed when it is ended here."""
    assert process.stdout is not None
    deadline, asked = time.monotonic() + limits.seconds, time.monotonic()
    buffer, outcome = bytearray(), None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            now = time.monotonic()
            if now > deadline:
                raise Killed(_OUT_OF_TIME, f"It took longer than {limits.seconds:.0f} seconds.")
            if now - asked >= 1.0:
                asked = now
                if not keep_going():
                    raise Killed("stopped", "It was stopped.")
            if not selector.select(timeout=0.5):
                continue
            chunk = os.read(process.stdout.fileno(), 1 << 16)
            if not chunk:
                return outcome
            buffer += chunk
            *lines, rest = buffer.split(b"\n")
            buffer = bytearray(rest)
            if len(buffer) > MAX_MESSAGE_BYTES:
                raise Killed(_CRASHED, "It said something too long.")
            for line in lines:
                message = json.loads(line)
                if "result" in message or "error" in message:
                    outcome = message
                else:
                    on_message(message)


def _judge(outcome: Message | None, code: int, limits: Limits, stderr: IO[bytes], own: Path) -> Any:
    if outcome is not None and "error" in outcome:
        error = outcome["error"]
        if error.get("kind"):
            raise Killed(error["kind"], _words(error["kind"], limits))
        raise Refused(error)
    if outcome is not None and code == 0:
        return _result(own)
    kind = {-signal.SIGXCPU: _OUT_OF_TIME, -signal.SIGXFSZ: _FILE_TOO_LARGE, -signal.SIGKILL: _OUT_OF_MEMORY}.get(code, _CRASHED)
    stderr.seek(0, os.SEEK_END)
    stderr.seek(max(0, stderr.tell() - 4000))
    said = stderr.read().decode("utf-8", "replace").strip().splitlines()
    if kind == _CRASHED and any("memory" in line.lower() or "bad_alloc" in line for line in said[-5:]):
        kind = _OUT_OF_MEMORY
    raise Killed(kind, _words(kind, limits) + (f" Its last words: {said[-1][:300]}" if said and kind == _CRASHED else ""))


def _result(own: Path) -> Any:
    """The result file in the child's folder: a plain file and no link, because the child read untrusted bytes."""
    handle = os.open(own / _RESULT, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(handle, "rb") as file:
        data = file.read(MAX_RESULT_BYTES + 1) if stat.S_ISREG(os.fstat(handle).st_mode) else b""
    if len(data) > MAX_RESULT_BYTES:
        raise Killed(_CRASHED, f"What it found is larger than {MAX_RESULT_BYTES >> 20} MiB.")
    return json.loads(data)


def _words(kind: str, limits: Limits) -> str:
    return {
        _OUT_OF_MEMORY: f"It needed more than {limits.memory_bytes / 2**30:.1f} GiB of memory.",
        _OUT_OF_TIME: f"It took longer than {limits.cpu_seconds} seconds.",
        _FILE_TOO_LARGE: f"It wrote more than {limits.file_bytes:,} bytes.",
    }.get(kind, "The reading process ended unexpectedly.")


# In the child -------------------------------------------------------------------------------------------------------


def _limit(limits: Limits) -> None:
    for what, value in (
        (resource.RLIMIT_AS, limits.memory_bytes),
        (resource.RLIMIT_CPU, limits.cpu_seconds),
        (resource.RLIMIT_FSIZE, limits.file_bytes),
        (resource.RLIMIT_NOFILE, limits.open_files),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(what)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        # At the hard limit of CPU time the kernel sends SIGKILL, which would look like a lack of memory.
        resource.setrlimit(what, (value, value + 5 if what == resource.RLIMIT_CPU and hard == resource.RLIM_INFINITY else value))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it, and a write would merely fail


class _Fault(Protocol):
    """An error with a hint, whoever raised it."""

    message: str
    hint: str
    code: str


def main() -> int:
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a stray print must not break the protocol
    request, leave = json.loads(sys.stdin.buffer.read()), Path.cwd() / _RESULT
    _limit(Limits(**request["limits"]))

    def say(message: Message) -> None:
        out.write(json.dumps(message).encode() + b"\n")
        out.flush()

    try:
        module, _, name = sys.argv[1].partition(":")
        result = getattr(importlib.import_module(module), name)(request["payload"], say)
        leave.write_text(json.dumps(result))
    except MemoryError:
        say(_spent())
        say({"error": {"kind": _OUT_OF_MEMORY}})
        return 1
    except Exception as error:
        say(_spent())
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            full = {"message": "The disk is full; nothing was saved.", "hint": "Make room, then try again.", "code": "disk_full"}
            say({"error": {**full, "details": {}}})
            return 1
        if not hasattr(error, "hint"):
            if "realloc" in str(error) or "malloc" in str(error):  # Arrow's wording
                say({"error": {"kind": _OUT_OF_MEMORY}})
                return 1
            raise
        fault = cast("_Fault", error)
        say({"error": {"message": fault.message, "hint": fault.hint, "code": fault.code, "details": getattr(fault, "details", {})}})
        return 1
    say(_spent())
    say({"result": True})
    return 0


def _spent() -> Message:
    """The peak memory of this process, and its CPU seconds. The kernel's `ru_maxrss` would also count what the parent held at the fork."""
    status, used = Path("/proc/self/status").read_text(), resource.getrusage(resource.RUSAGE_SELF)
    return {"peak_bytes": int(status.partition("VmHWM:")[2].split()[0]) * 1024, "cpu_seconds": round(used.ru_utime + used.ru_stime, 2)}


if __name__ == "__main__":
    sys.exit(main())
