"""Finds and ends what a studio left behind when it was killed: trainers in sessions of their own, servers, workers.

Every process of a studio has `LUTHIER_STUDIO=<data folder>:<run>` in its environment, which its children inherit. PostgreSQL and
Valkey overwrite their environment; they are recognized by their working directory.

Run as a program it is the warden: it sleeps until the supervisor dies, then ends everything of that one run that did not die by
itself. So `kill -9` of the supervisor leaves nothing behind, not even a trainer in the middle of a step.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from app.ops.embedded.places import socket_path

MARK = "LUTHIER_STUDIO"
SERVERS_GRACE_SECONDS = 10.0


def mark(data_dir: Path, run: str) -> str:
    """The value of the mark. `run` is new at every start."""
    return f"{data_dir}:{run}"


def marked(data_dir: Path, run: str = "") -> Iterator[int]:
    """Process ids with the mark of this folder, of one run or (without `run`) of any; never the caller's own."""
    wanted = f"{MARK}={mark(data_dir, run)}".encode()
    for pid in processes():
        with contextlib.suppress(OSError):
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if any(item == wanted if run else item.startswith(wanted) for item in variables):
                yield pid


def working_in(folder: Path) -> Iterator[int]:
    """Process ids with this working directory: the servers, which chdir into their data."""
    target = os.path.realpath(folder)
    for pid in processes():
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{pid}/cwd") == target:
                yield pid


def processes() -> Iterator[int]:
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            yield int(name)


def end(pids: Iterator[int] | list[int], signal_: int = signal.SIGKILL, wait_seconds: float = 5.0) -> list[int]:
    """Send a signal and wait until they are gone. Returns those that are still there."""
    left = list(pids)
    for pid in left:
        with contextlib.suppress(OSError):
            os.kill(pid, signal_)
    deadline = time.monotonic() + wait_seconds
    while left and time.monotonic() < deadline:
        left = [pid for pid in left if is_alive(pid)]
        time.sleep(0.02 if left else 0)
    return left


def is_alive(pid: int) -> bool:
    """Whether the process still runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (OSError, IndexError):
        return False


def clear(data_dir: Path) -> list[int]:
    """End what an earlier studio on this folder left, then remove the lock files of dead servers.

    Only the holder of the folder's lock may call this: then every process found is a leftover. PostgreSQL gets its fast shutdown
    first. Stale lock files (`postmaster.pid`, and the one next to the socket) are removed here: the pid in them may by now belong
    to another process, or to a zombie that nobody reaps (in a container whose first process does not), and PostgreSQL would take
    a server to be running and refuse to start.
    """
    found = [*marked(data_dir), *working_in(data_dir / "postgres"), *working_in(data_dir / "valkey")]
    end(end(working_in(data_dir / "postgres"), signal.SIGINT, wait_seconds=10))
    end([pid for pid in found if is_alive(pid)])
    (data_dir / "postgres" / "postmaster.pid").unlink(missing_ok=True)
    for left in socket_path(data_dir, "postgres").glob(".s.PGSQL.*"):
        left.unlink(missing_ok=True)
    return found


def warden(data_dir: Path, run: str, supervisor: int) -> None:
    """Sleep until the supervisor is gone, give its servers an orderly shutdown, and end the rest of its run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        gone = os.pidfd_open(supervisor)
        select.select([gone], [], [])
    except ProcessLookupError:
        pass
    for _ in range(3):  # a process that was just starting when the supervisor died may show its mark a moment later
        servers = {*working_in(data_dir / "postgres"), *working_in(data_dir / "valkey")}
        end([pid for pid in marked(data_dir, run) if pid not in servers])
        time.sleep(0.3)
    # The death signal has told the servers to stop (app/kit/launch.py); they may take as long as in an orderly stop.
    deadline = time.monotonic() + SERVERS_GRACE_SECONDS
    while any(True for _ in marked(data_dir, run)) and time.monotonic() < deadline:
        time.sleep(0.1)
    end(marked(data_dir, run))


if __name__ == "__main__":
    warden(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
