"""The environment of trainers, hang and out-of-memory detection, and what exit codes stand for."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import signal
import statistics
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

from app import events
from app.errors import BadData, StudioError
from app.jobs.gangs import Rendezvous
from app.jobs.lifecycle import Claim
from app.kit import manifest, tracing
from app.kit.logs import turned_over
from app.machines.gpus import CUDA_ORDER, NONE_VISIBLE
from app.machines.hardware import this_machine
from app.settings import get_settings
from app.storage import objects
from worker.runtime import failures
from worker.supervision import confinement

STOPPED = 75
"""Exit code of a trainer that saved and left because it was asked to (EX_TEMPFAIL)."""

ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(16 * 2**30), "MALLOC_TOP_PAD_": str(64 * 2**20)}
"""glibc returns each large tensor to the kernel and gets it again, zeroed, for the next. Keeping the memory saves most of the
page faults of training on a CPU."""

CUDA_ALLOCATOR = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
"""Lets freed GPU memory segments grow and merge, so that tensors of other sizes fit into them: packs of other lengths in an
evaluation would otherwise fragment it."""

THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Threads of a product that wait for each other sleep instead of spinning. Where anything else runs on the cores (the playground,
another job), spinning threads take the time of those they wait for: a decoding loop on two busy cores ran at 2.2 tokens/s
spinning and at 10 sleeping."""

# fmt: off
_HANDED_ON = {
    "PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV",
    "CC", "CXX",  # what Triton and torch's compiler build with
    "LUTHIER_CUDA_GRAPHS", "LUTHIER_GPU_MEMORY_BYTES", "LUTHIER_KEEP_CHECKPOINTS", "LUTHIER_KERNELS", "LUTHIER_LOG_FORMAT", "LUTHIER_LOG_LEVEL",
    "LUTHIER_STUDIO",  # the mark by which the warden knows a trainer, and whatever it started in turn, as this studio's
}
_HANDED_ON_PREFIXES = (
    "CUDA_", "NVIDIA_", "HIP_", "ROCR_", "HSA_", "MIOPEN_", "RCCL_", "NCCL_", "GLOO_", "TORCH", "PYTORCH_", "TRITON_", "OMP_", "MKL_", "OPENBLAS_", "KMP_", "GOMP_", "NUMBA_",
)
# fmt: on


def trainer_environment(ours: Mapping[str, str], folder: Path | None = None, device: str = "auto") -> dict[str, str]:
    """The environment of a trainer: no database address, no key, no token. An allow-list cannot forget a secret that is added
    later. `folder` is the attempt's own, for its temporary files; None for what has no attempt. With the device cpu it sees no
    GPU, so that it takes no GPU memory either."""
    kept = {name: value for name, value in ours.items() if name in _HANDED_ON or name.startswith(_HANDED_ON_PREFIXES)}
    if device == "cpu":
        kept |= NONE_VISIBLE
    cuda = CUDA_ALLOCATOR if this_machine().on(device).cuda and "PYTORCH_CUDA_ALLOC_CONF" not in kept else {}
    own = confinement.environment_in(folder) if folder else {name: ours[name] for name in ("HOME", "TMPDIR") if name in ours}
    return ALLOCATOR | THREADS | cuda | own | kept | tracing.environment() | CUDA_ORDER | {
        "LUTHIER_DATA_DIR": str(get_settings().data_dir),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }  # fmt: skip


def launcher(processes: int, together: Rendezvous | None = None) -> list[str]:
    """The command that starts several processes for one job, on each of its machines. They get as long to save as a single one when they are
    told to stop."""
    patience = math.ceil(get_settings().stop_grace_seconds)
    where = ["--standalone"]
    if together:
        host, _, port = together.address.rpartition(":")
        where = ["--nnodes", str(together.machines), "--node-rank", str(together.place), "--master-addr", host, "--master-port", port]
    return ["-m", "torch.distributed.run", *where, "--nproc-per-node", str(processes), "--shutdown-timeout", str(patience)]


def trainer_command(held: Claim, spec: Path, write_end: int, together: Rendezvous | None = None, checkpoint: str = "") -> list[str]:
    started_by = [sys.executable, "-m", "worker.run"]
    if held.processes > 1 or together:
        started_by[1:1] = launcher(held.processes, together)
    # fmt: off
    return [
        *started_by, "--spec", str(spec), "--folder", held.folder,
        "--resume-from", f"runs/{held.job_id}", "--events-fd", str(write_end),
        *(["--pause-at", str(held.pause_at)] if held.pause_at is not None else []),
        # Without an object storage all machines see one folder, and take the newest there.
        *(["--resume-step", checkpoint.rpartition("-")[2] or "0"] if together and objects.storage() is not None else []),
    ]
    # fmt: on


def ask_to_save(pid: int, processes: int = 1) -> bool:
    """Ask a trainer to save and continue; returns whether there was one to ask. A launcher would die of the signal and is
    skipped: the processes that it started agree on what any of them was asked."""
    asked = [pid]
    if processes > 1:
        with contextlib.suppress(OSError):
            asked = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    for one in asked:
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, signal.SIGUSR1)
    return bool(asked)


def is_away(error: DBAPIError) -> bool:
    """Whether the database is unreachable or shutting down, as opposed to refusing a statement."""
    return isinstance(error, OperationalError | InterfaceError) or error.connection_invalidated


class HangDetector:
    """Detects a hang by the trainer's own pace: silence of ten median steps, but at least `least` seconds; `first` seconds before
    the first step."""

    def __init__(self, first: float, least: float) -> None:
        self.first, self.least = first, least
        self.step: int | None = None
        self._steps: deque[float] = deque(maxlen=50)
        self._last_step: float | None = None
        self._heard = time.monotonic()

    def note(self, event: events.TrainerEvent) -> None:
        self._heard = time.monotonic()
        if isinstance(event, events.Step):
            if self._last_step is not None:
                self._steps.append(self._heard - self._last_step)
            self.step, self._last_step = event.step, self._heard
        elif isinstance(event, events.Saved):
            self.step = event.step

    def patience(self) -> float:
        if not self._steps:
            return self.first
        return max(self.least, 10 * statistics.median(list(self._steps)))

    def silent_too_long(self) -> bool:
        return time.monotonic() - self._heard > self.patience()


class OomWatch:
    """Counts the kernel's out-of-memory kills in our control group. Only an increase is evidence."""

    def __init__(self) -> None:
        self._before = _oom_kills()

    def killed_since(self) -> bool:
        return _oom_kills() > self._before


def _oom_kills() -> int:
    """`oom_kill` of our control group and of every group above it, versions 1 and 2."""
    kills = 0
    for line in _read("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            kills += _highest(Path("/sys/fs/cgroup"), path, "memory.events")
        elif "memory" in controllers.split(","):
            kills += _highest(Path("/sys/fs/cgroup/memory"), path, "memory.oom_control")
    return kills


def _highest(root: Path, path: str, name: str) -> int:
    here = root / path.strip("/")
    most = 0
    for folder in (here, *here.parents):
        for line in _read(folder / name).splitlines():
            word, _, count = line.partition(" ")
            if word == "oom_kill":
                most = max(most, int(count))
        if folder == root:
            break
    return most


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def tail(path: Path, most: int = 4000) -> str:
    """The end of a log, in whole lines: at most so many bytes. What a rotation has just moved aside is read before it."""
    size, text = _end(path, most)
    if size < most:
        before, end = _end(turned_over(path), most - size)
        size, text = size + before, end + text
    said = text.decode(errors="replace")
    return said if size <= most else said.partition("\n")[2]


def _end(path: Path, most: int) -> tuple[int, bytes]:
    """Size of a file and its last bytes; nothing of a file that cannot be read."""
    try:  # no link and no pipe: whoever writes the log could have put one there
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - most))
            return size, file.read(most)
    except OSError:
        return 0, b""


def classify(code: int, said: str, kernel_killed: bool) -> events.Failed:
    """The failure that an exit without a final event stands for. `code` is negative for a signal; `said` is the end of its log."""
    number = -code if code < 0 else code - 128 if code > 128 else 0
    if number == signal.SIGKILL and kernel_killed:
        return _out_of_memory("The kernel killed the trainer because the machine ran out of memory.")
    if number in (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        return events.Failed(kind="worker_lost", message=f"The trainer was killed by {signal.Signals(number).name}.")
    quoted = f" It said last:\n{_last_words(said)}" if said.strip() else ""
    if (fault := failures.of_gpu(said)) is not None:
        return fault.model_copy(update={"message": f"{fault.message}{quoted}"})
    if "No space left on device" in said:
        return of_os_error(OSError(errno.ENOSPC, "No space left on device"))
    if "MemoryError" in said or "Cannot allocate memory" in said or "can't allocate memory" in said:
        return _out_of_memory(f"The trainer ran out of memory.{quoted}")
    how = f"by {signal.Signals(number).name}" if number in signal.valid_signals() else f"with exit code {code}"
    return events.Failed(
        kind="crashed", message=f"The trainer ended {how}.{quoted}", hint="Look at its log; if you see no reason, report it."
    )


_REPORT = re.compile(r"Failures:\n(.*?)Root Cause \(first observed failure\):(.*)", re.DOTALL)
_ENDED = re.compile(r"\btime +: (\S+).*?\brank +: (\d+) .*?\bexitcode +: (-?\d+)", re.DOTALL)


def of_process(said: str, size: int, kernel_killed: bool) -> events.Failed | None:
    """The failure of the process, of the `size` that torchrun started, which ended first, where a signal ended it; by the end of the log,
    where torchrun names it. None where none is named, or it was only the first to give up waiting for another one.

    Processes that end within one look of torchrun have one time and the order of their ranks, so that the one it calls the first may
    have waited for another of them; those that it killed itself afterwards have a later time."""
    if (report := _REPORT.search(said)) is None or not (first := _ENDED.findall(report[2])):
        return None
    gave_up = failures.of_peer(said, "") is not None
    for when, rank, code in first + _ENDED.findall(report[1]):
        number = -int(code)
        if when == first[0][0] and number > 0 and number != signal.SIGTERM and not (gave_up and number == signal.SIGABRT):
            fault = classify(-number, "", kernel_killed)
            return fault.model_copy(update={"message": f"Process {rank} of {size}: {fault.message}"})
    return None


def _out_of_memory(message: str) -> events.Failed:
    hint = "Use fewer tokens per batch, shorter rows or a smaller model, or run fewer workers at a time."
    return events.Failed(kind="out_of_memory", message=message, hint=hint)


def of_os_error(error: OSError) -> events.Failed:
    """Our own failure to start an attempt or keep its files."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = "Free some space; the job goes on by itself from its newest checkpoint."
        return events.Failed(kind="disk_full", message="The disk of the data folder is full.", hint=hint)
    if error.errno in (errno.ENOMEM, errno.EAGAIN):
        return _out_of_memory(f"The trainer could not be started: {error.strerror}.")
    return events.Failed(kind="crashed", message=f"The trainer could not be started: {error}.", hint="Look at the worker's log.")


def _last_words(said: str, lines: int = 12) -> str:
    return "\n".join(said.strip().splitlines()[-lines:])


def check_result(folder: Path) -> events.Failed | None:
    """None when the result's folder is complete. A trainer that reports success is believed only with its manifest."""
    try:
        if (odd := confinement.foreign(folder)) is not None:
            raise BadData(f"{odd.name} is no plain file.")
        manifest.check(folder)
    except (StudioError, OSError) as error:
        return events.Failed(kind="crashed", message=f"The trainer finished, but its result is not whole: {error}", hint="Resume the job.")
    return None
