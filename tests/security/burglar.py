"""A process that tries what the code of a hostile model would: `python -m tests.security.burglar TARGETS`, JSON in and out.

Started behind walls by `benchmarks/confinement.py`. Each answer is whether the attempt went through; what a job needs is
tried too, and must.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIBC = ctypes.CDLL(None, use_errno=True)


def reads(path: str) -> bool:
    return bool(Path(path).read_bytes())


def lists(path: str) -> bool:
    return bool(os.listdir(path))


def writes(path: str) -> bool:
    Path(path).write_bytes(b"x")
    return True


def connects(family: int, address: Any) -> bool:
    with socket.socket(family) as one:
        one.settimeout(1)
        one.connect(tuple(address) if isinstance(address, list) else address)
    return True


def calls(name: str, *arguments: Any) -> bool:
    return getattr(LIBC, name)(*arguments) == 0


def mounts(folder: str) -> bool:
    """On a folder of its own, and taken off again: where nothing is walled off this is the machine itself."""
    place = folder.encode()
    return calls("mount", b"none", place, b"tmpfs", ctypes.c_ulong(0), None) and calls("umount2", place, 2)


def in_child(what: Callable[[], bool]) -> bool:
    """Tried where it changes nothing for the attempts after it."""
    if (child := os.fork()) == 0:
        with contextlib.suppress(OSError):
            os._exit(0 if what() else 1)
        os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def allocates(mebibytes: int) -> bool:
    with contextlib.suppress(MemoryError):
        return len(bytearray(mebibytes << 20)) > 0
    return False


def opens(count: int) -> bool:
    with contextlib.suppress(OSError):
        return all(os.open("/dev/null", os.O_RDONLY) for _ in range(count))
    return False


def forks(count: int) -> bool:
    """Whether that many processes can be had at once; all are gone afterwards."""
    children: list[int] = []
    try:
        for _ in range(count):
            if (child := os.fork()) == 0:
                signal.pause()
                os._exit(0)
            children.append(child)
    except OSError:
        return False
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return True


def status(name: str) -> str:
    return Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0]


def runs_a_program() -> bool:
    return subprocess.run(["/bin/sh", "-c", "exit 0"], check=False).returncode == 0


def passes_files() -> bool:
    with tempfile.NamedTemporaryFile() as file, tempfile.NamedTemporaryFile(dir="/dev/shm") as shared:
        return bool(file.write(b"x") and shared.write(b"x"))


def starts_a_thread() -> bool:
    done = threading.Event()
    threading.Thread(target=done.set).start()
    return done.wait(5)


def renames(folder: str) -> bool:
    """As a checkpoint is written: under another name, then renamed."""
    made = Path(tempfile.mkdtemp(dir=folder))
    (made / "part").write_bytes(b"x")
    (made / "part").rename(made / "whole")
    made.rename(Path(folder, "checkpoint"))
    return reads(f"{folder}/checkpoint/whole")


def attempts(given: dict[str, Any]) -> dict[str, Callable[[], bool]]:
    """By name; what begins with `needs` is what a job cannot do without."""
    unix, tcp, pid = socket.AF_UNIX, socket.AF_INET, given["victim"]
    return {
        "needs its model": lambda: reads(given["model"]) and lists(os.path.dirname(given["model"])),
        "needs its rows": lambda: reads(given["rows"]),
        "needs its job's checkpoints": lambda: reads(given["checkpoint"]),
        "needs to write its folder": lambda: writes(f"{given['own']}/result") and renames(given["own"]),
        "needs passing files": passes_files,
        "needs programs": runs_a_program,
        "needs threads": starts_a_thread,
        "needs libraries": lambda: bool(__import__("numpy").ones(3).sum()),
        "read secrets/postgres": lambda: reads(given["secret"]),
        "list the data folder": lambda: lists(given["data"]),
        "read another model": lambda: reads(given["other_model"]),
        "read another job": lambda: reads(given["other_job"]),
        "write another job": lambda: writes(given["other_job"] + ".new"),
        "write its model": lambda: writes(given["model"] + ".new"),
        "write an older attempt": lambda: writes(given["checkpoint"]),
        "write our sources": lambda: writes(given["source"]),
        "read /etc/shadow": lambda: reads("/etc/shadow"),
        "list the home folder": lambda: lists(given["home"]),
        "read its parent's environment": lambda: reads(f"/proc/{os.getppid()}/environ"),
        "read another's environment": lambda: reads(f"/proc/{pid}/environ"),
        "signal another process": lambda: os.kill(pid, 0) is None,
        "trace another process": lambda: calls("ptrace", ctypes.c_long(0x4206), pid, None, None),
        "read another's memory": lambda: reads_memory(pid),
        "connect to the broker's socket": lambda: connects(unix, given["broker"]),
        "connect to an abstract socket": lambda: connects(unix, given["abstract"]),
        "connect to 127.0.0.1": lambda: connects(tcp, ["127.0.0.1", given["port"]]),
        "connect to this machine's address": lambda: connects(tcp, [given["address"], given["port"]]),
        "mount": lambda: in_child(lambda: mounts(f"{given['own']}/tmp")),
        "make a user namespace": lambda: in_child(lambda: calls("unshare", 0x10000000)),
        "become root": lambda: in_child(lambda: os.getuid() != 0 and os.setuid(0) is None),
        "have capabilities": lambda: any(int(status(name), 16) for name in ("CapEff", "CapPrm", "CapInh", "CapAmb")),
        "gain privileges": lambda: status("NoNewPrivs") != "1",
        "dump its memory": lambda: resource.getrlimit(resource.RLIMIT_CORE)[1] != 0,
        "take more memory": lambda: in_child(lambda: allocates(given["mebibytes"])),
        "open more files": lambda: in_child(lambda: opens(given["files"])),
        "start more processes": lambda: in_child(lambda: forks(given["tasks"])),
        "have memory spared for it": lambda: in_child(lambda: int(Path("/proc/self/oom_score_adj").read_text()) < 500),
    }


def reads_memory(pid: int) -> bool:
    with open(f"/proc/{pid}/mem", "rb"):
        return True


def main() -> None:
    found = {"held": os.environ.get("LUTHIER_CONFINED", "").split(","), "uid": os.getuid(), "went_through": {}}
    for name, attempt in attempts(json.loads(sys.argv[1])).items():
        try:
            found["went_through"][name] = attempt()
        except (OSError, ValueError, ImportError):
            found["went_through"][name] = False
    print(json.dumps(found))


if __name__ == "__main__":
    main()
