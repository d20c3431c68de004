"""What a trainer or an evaluation process may access, and which of its reports are trusted: it runs code of a foreign model.

Readable: the system, our sources, its model, its rows, its job's folder. Writable: its attempt's own folder, the caches of
embeddings and speeds shared between jobs, and the trainers' own cache of compiled kernels, which nothing outside the sandbox
reads.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import stat
import time
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import psutil

from app import events
from app.evaluation.service import EvaluationSpec
from app.kit.confinement import Confinement, cache_folders
from app.machines.hardware import MEASURED, this_machine, usable_memory
from app.settings import get_settings
from app.spec import JobSpec
from worker.runtime import kernel_cache

KEPT_BY_JOBS = ("features", MEASURED)


def room_of(
    spec: JobSpec | EvaluationSpec, folder: Path, environment: Mapping[str, str], processes: int = 1, machines: int = 1
) -> Confinement:
    """The confinement of `processes` that work on `spec` together and write into `folder` (that of an attempt, for example, whose job's
    folder is above it)."""
    settings = get_settings()
    data = settings.data_dir
    gpu = this_machine().cuda and environment.get("CUDA_VISIBLE_DEVICES") != ""
    return Confinement(
        read=[folder.parent, *(data / path for path in reads(spec))],
        write=[folder, *(settings.folder(name) for name in KEPT_BY_JOBS), *cache_folders(environment)],
        sockets="network" if machines > 1 else "loopback" if processes > 1 else "local" if gpu else "none",
        gpu=gpu,
        memory_bytes=None if gpu else 2 * usable_memory() + psutil.swap_memory().total + 4 * 2**30,
    )


def reads(spec: JobSpec | EvaluationSpec) -> list[str]:
    """The models and rows that such a process reads, relative to the data folder."""
    other = spec.base if isinstance(spec, EvaluationSpec) else spec.teacher
    models = [spec.model, *([other] if other else [])]
    rows = [spec.dataset, *([spec.validation] if isinstance(spec, JobSpec) and spec.validation else [])]
    adapters = [adapter.path for model in models for adapter in model.adapters]
    return [path for path in (*(model.path for model in models), *(row.path for row in rows), *adapters) if path]


def environment_in(folder: Path) -> dict[str, str]:
    """Environment of a confined process: where it keeps temporary files and what it compiles. What a process of ours compiled
    before is copied once: it must not be read from where others may write."""
    data = get_settings().data_dir
    (tmp := folder / "tmp").mkdir(parents=True, exist_ok=True, mode=0o700)
    caches = get_settings().folder("cache", "trainers")
    compiled, own = kernel_cache.folder(), caches / "numba"
    if compiled.is_relative_to(data) and compiled.is_dir() and not (own / compiled.name).exists():
        with contextlib.suppress(OSError):
            shutil.copytree(compiled, partial := own / f"{compiled.name}.{os.getpid()}", dirs_exist_ok=True)
            partial.rename(own / compiled.name)
    return {
        "HOME": str(tmp),
        "TMPDIR": str(tmp),
        "NUMBA_CACHE_DIR": str(own),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "CUDA_CACHE_PATH": str(caches / "cuda"),
    }


def clean(folder: Path) -> None:
    """Remove what only the process itself needed."""
    shutil.rmtree(folder / "tmp", ignore_errors=True)


# Its end ------------------------------------------------------------------------------------------------------------------


class MountSpace:
    """The mount namespace of a confined process, by which everything it started is found: a child can leave its parent's process
    group and session, but not its mount namespace. Held open, so that its number cannot be reused."""

    def __init__(self) -> None:
        self._handle: int | None = None

    def look(self, pid: int) -> None:
        """Open it, once the process is confined; no effect where it has no mount namespace of its own."""
        if self._handle is None:
            with contextlib.suppress(OSError):
                handle = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
                if _number(handle) == _number("/proc/self/ns/mnt"):
                    os.close(handle)
                else:
                    self._handle = handle

    def end(self) -> None:
        """Kill what is left in it, and close it."""
        if self._handle is None:
            return
        number = _number(self._handle)
        for _ in range(50):
            left = [int(name) for name in os.listdir("/proc") if name.isdigit() and _number(f"/proc/{name}/ns/mnt") == number]
            if not left:
                break
            for pid in left:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        os.close(self._handle)
        self._handle = None


def _number(space: int | str) -> int | None:
    with contextlib.suppress(OSError):
        return os.stat(space).st_ino
    return None


# Its word -----------------------------------------------------------------------------------------------------------------


def believed(event: events.TrainerEvent, folder: str) -> events.TrainerEvent:
    """The event, unless it names a path outside the attempt's own `folder` (relative to the data folder): a path reported as a
    checkpoint is deleted one day, and one reported as a result is served as a model."""
    if isinstance(event, events.Saved | events.Finished) and not _inside(event.path, folder):
        message = f"The trainer named {event.path[:200]!r}, which is not in its own folder."
        if isinstance(event, events.Finished):
            return events.Failed(kind="crashed", message=message, hint="Do not use its model: it is not what it claims to be.")
        return events.Log(level="warn", message=message)
    return event


def _inside(path: str, folder: str) -> bool:
    parts = PurePosixPath(path).parts
    if ".." in parts or parts[: len(own := PurePosixPath(folder).parts)] != own or parts == own:
        return False
    data = get_settings().data_dir
    return (data / path).resolve().is_relative_to((data / folder).resolve())


def foreign(folder: Path) -> Path | None:
    """The first thing in a result's folder that is no plain file and no folder: a link would expose a file from elsewhere to
    whoever downloads the result, and reading a pipe would block."""
    for above, folders, names in os.walk(folder):
        for name in (*folders, *names):
            mode = (path := Path(above, name)).lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                return path
    return None
