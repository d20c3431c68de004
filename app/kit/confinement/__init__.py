"""Sandbox of processes that open untrusted input: trainers, evaluations, upload parsers, converters.

    confined([sys.executable, "-m", "worker.run", …], Confinement(read=[…], write=[…]))

is the command that starts the same program behind as many layers as this machine allows. A `Confinement` lists what is
accessible: which folders may be read and written, which sockets created, whether a GPU is visible. Each layer is tried when a
process starts and none is assumed; `report` tells which hold, and `luthier doctor` shows it.

    enter.py    the script that confines itself and then becomes the program
    kernel.py   the system calls that it uses
"""

from __future__ import annotations

import functools
import glob
import hashlib
import json
import os
import pwd
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from app.settings import PROJECT, RESOURCES, get_settings

LAYERS = ("limits", "mounts", "network", "capabilities", "landlock", "seccomp")
ENTER = str(Path(__file__).with_name("enter.py"))

Sockets = Literal["none", "local", "loopback", "network"]
"""What a process may connect to: nothing, programs of this machine by a socket file, its own processes, or other machines."""

MAX_OPEN_FILES = 16_384
MAX_TASKS = 4096
"""Processes and threads of one user, in addition to those already running."""
MAX_FILE_BYTES = 1 << 40

_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/opt", "/nix", "/gnu", "/var/cache/fontconfig")
_ETC = (
    "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "ld.so.preload", "passwd", "group", "nsswitch.conf", "hosts", "host.conf", "localtime", "timezone",
    "alternatives", "os-release", "mime.types", "gai.conf", "OpenCL", "nvidia", "nvidia-container-runtime", "ld-nix.so.preload",
)  # fmt: skip
_OURS = ("app", "worker", "samples", "tests", "benchmarks")
_DEVICES = ("null", "zero", "full", "random", "urandom")
_GPU_DEVICES = ("nvidia*", "dri", "kfd", "dxg")
_CACHES = ("NUMBA_CACHE_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH")
"""Environment variables that name caches of compiled kernels."""


@dataclass(frozen=True)
class Confinement:
    """What a confined process may access; everything else of the disk, the network and the machine is out of reach.

    `memory_bytes` limits its allocations (None: unlimited, as a GPU driver needs). `layers` disables some layers, for tests and
    for the table of them.
    """

    read: Sequence[Path] = ()
    write: Sequence[Path] = ()
    sockets: Sockets = "none"
    gpu: bool = False
    memory_bytes: int | None = None
    layers: Sequence[str] = field(default=LAYERS)


def confined(command: Sequence[str], room: Confinement, *, parent: int | None = None, report: bool = False) -> list[str]:
    """`command`, to be started within `room`. `parent` is the process it dies with (by default this one; 0: none)."""
    settings = get_settings()
    order = {
        "system": (system := _system(str(settings.data_dir))),
        "links": _links(),
        "project": str(PROJECT),
        "read": _present(room.read),
        "write": _present(room.write),
        "devices": _devices(room.gpu),
        "sockets": room.sockets,
        "limits": _limits(room.memory_bytes),
        "uid": spare_uid("trainer", settings.data_dir) if os.geteuid() == 0 and _readable_by_all(system) else 0,
        "parent": os.getpid() if parent is None else parent,
        "layers": [] if settings.confinement == "off" else list(room.layers),
        "required": settings.confinement == "required",
        "report": report,
    }
    return [sys.executable, "-I", "-S", ENTER, json.dumps(order), *command]


def report(room: Confinement | None = None) -> dict[str, Any]:
    """The layers that hold for a process started now: `held`, `missing` with the reason for each, and the user it runs as."""
    room = room or Confinement()
    done = subprocess.run(confined([], room, report=True), capture_output=True, text=True, cwd=PROJECT, timeout=30, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip() or f"ended with {done.returncode}").splitlines()[-1]
        return {"held": [], "missing": dict.fromkeys(LAYERS, reason), "uid": os.geteuid()}
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def spare_uid(purpose: str, data_dir: Path) -> int:
    """A user id that belongs to this data folder and to no user, so that files and processes are shared with nothing else.

    Far above the ids of people, services and containers; below 65,536 in a container that has no others.
    """
    digest = int.from_bytes(hashlib.sha256(f"{data_dir}:{purpose}".encode()).digest()[:4])
    known = _mapped()
    for uid in (1_900_000_000 + digest % 100_000_000, *(61_184 + (digest + step) % 4_000 for step in range(20))):
        if any(uid in numbers for numbers in known) and not names_somebody(uid):
            return uid
    return 0


def cache_folders(environment: Mapping[str, str]) -> list[Path]:
    """The folders in which the environment keeps compiled kernels, created when missing."""
    folders = [Path(environment[name]) for name in _CACHES if environment.get(name)]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folders


def _mapped() -> list[range]:
    found = []
    for line in Path("/proc/self/uid_map").read_text().splitlines():
        first, _, count = map(int, line.split())
        found.append(range(first, first + count))
    return found


def names_somebody(uid: int) -> bool:
    """Whether a user of this machine has this id."""
    try:
        pwd.getpwuid(uid)
    except KeyError:
        return False
    return True


# What every room has ------------------------------------------------------------------------------------------------------


@functools.cache
def _system(data: str) -> list[str]:
    """Programs and libraries: the system's, this Python's and our own sources; never the data folder, wherever it is."""
    parts = [p for p in _SYSTEM if not os.path.islink(p)] + [f"/etc/{name}" for name in _ETC]
    python = [sys.prefix, sys.base_prefix, *sys.path, *os.environ.get("LD_LIBRARY_PATH", "").split(":")]
    parts += [str(PROJECT / name) for name in _OURS]
    # The surroundings of a checkout are private; those of an installed package are Python itself.
    around = str(PROJECT) if RESOURCES == PROJECT else ""
    parts += [path for path in python if path and not (around and _above(path, around)) and path != "/"]
    real = {os.path.realpath(path) for path in parts if os.path.isabs(path)} | {path for path in parts if os.path.isabs(path)}
    kept = sorted(found for path in real if os.path.exists(path) for found in _without(path, {data, os.path.realpath(data)}))
    return [path for path in kept if not any(_above(other, path) and other != path for other in kept)]


def _without(path: str, hidden: set[str]) -> Iterator[str]:
    """`path`, or those parts of it that do not contain what is to be hidden."""
    if not any(_above(path, one) for one in hidden):
        if not any(_above(one, path) for one in hidden):
            yield path
        return
    for name in sorted(os.listdir(path)):
        if (inner := os.path.join(path, name)) not in hidden:
            yield from _without(inner, hidden)


def _above(folder: str, path: str) -> bool:
    """Whether `path` is `folder` or is inside it."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")


@functools.cache
def _links() -> dict[str, str]:
    """Symbolic links of the root (/bin → usr/bin), and those on the way to this Python."""
    found = {path: os.readlink(path) for path in _SYSTEM if os.path.islink(path)}
    step = sys.executable
    while os.path.islink(step):
        target = os.readlink(step)
        if not any(_above(folder, step) for folder in (sys.prefix, sys.base_prefix, *_SYSTEM)):
            found[step] = target
        step = os.path.normpath(os.path.join(os.path.dirname(step), target))
    return found


def _readable_by_all(system: Sequence[str]) -> bool:
    """Whether users other than root can run this Python and our sources, once these are mounted for them: an installation made
    with a tight umask is for root alone."""
    samples = (os.path.realpath(sys.executable), os.__file__, str(PROJECT / "worker"), sysconfig.get_path("purelib"))
    return all(open_to_all(sample, system) for sample in samples)


def open_to_all(path: str, shown: Sequence[str]) -> bool:
    """Whether everyone may read `path`, through the folder of `shown` that contains it."""
    while any(_above(folder, path) for folder in shown):
        mode = os.stat(path).st_mode
        if not mode & stat.S_IROTH or (stat.S_ISDIR(mode) and not mode & stat.S_IXOTH):
            return False
        path = os.path.dirname(path)
    return True


def _devices(gpu: bool) -> list[str]:
    names = [f"/dev/{name}" for name in _DEVICES]
    return names + [path for pattern in _GPU_DEVICES for path in sorted(glob.glob(f"/dev/{pattern}"))] if gpu else names


def _limits(memory_bytes: int | None) -> dict[str, int]:
    tasks = int(Path("/proc/loadavg").read_text().split()[3].partition("/")[2])
    bounds = {"CORE": 0, "NOFILE": MAX_OPEN_FILES, "NPROC": MAX_TASKS + tasks, "FSIZE": MAX_FILE_BYTES}
    return bounds | ({"DATA": memory_bytes} if memory_bytes else {})


def _present(paths: Iterable[Path]) -> list[str]:
    """The existing ones, each once, resolved."""
    return sorted({str(path.absolute()) for path in paths if path.exists()})
