"""Maps low-level errors to failures of a job.

A GPU error is too little memory, a fault of the card or its driver, or a bug in a program. CUDA reports it by a number and the
text of `cudaGetErrorString`, mostly at some later call than the one at fault, and every call of the same process fails from then
on. So a fault of the card is retried, in a new process; a device-side assertion (an index out of range, for example) would only
occur again.
"""

from __future__ import annotations

import errno
from pathlib import Path

from app import events
from app.errors import StudioError

MISTAKES = ("device-side assert triggered",)

MEMORY = ("CUDA out of memory", "OutOfMemoryError", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")

CARD = (
    "uncorrectable ECC error",
    "uncorrectable NVLink error",
    "an illegal memory access was encountered",
    "the launch timed out",
    "hardware stack error",
    "an illegal instruction was encountered",
    "misaligned address",
    "invalid program counter",
    "unspecified launch failure",
    "Invalid access of peer GPU memory over nvlink or a hardware error",
    "CUDA error: unknown error",
    "CUDA error: initialization error",
    "busy or unavailable",
    "no CUDA-capable device is detected",
    "GPU is lost",
    "system not yet initialized",
    "CUBLAS_STATUS_EXECUTION_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_EXECUTION_FAILED",
    "NCCL error",
)
"""Error texts of CUDA 12 and 13, cuBLAS, cuDNN and torch's NCCL."""


def of_gpu(said: str) -> events.Failed | None:
    """The failure that a text stands for, of one error or of the end of a log; None when it is no GPU error."""
    if any(text in said for text in MISTAKES):
        return None
    if any(text in said for text in MEMORY):
        hint = "Split each batch over more passes (micro_batches), cut the rows shorter, or recompute activations."
        return events.Failed(kind="cuda_out_of_memory", message="The GPU ran out of memory.", hint=hint)
    found = next((text for text in CARD if text in said), None)
    if found is None:
        return None
    hint = "`nvidia-smi -q` and `dmesg | grep Xid` tell more about the card. Where it stays, restart the driver or take another card."
    return events.Failed(kind="gpu_fault", message=f"The GPU or its driver failed: {found}.", hint=hint)


PEER = (
    "gloo/transport",  # closed or reset by a process that ended, or timed out
    "Watchdog caught collective operation timeout",
    "ncclRemoteError",
    "remote process exited",
)
"""What torch.distributed says in a process whose collective another one did not take part in: of gloo, and of NCCL."""


def of_peer(said: str, waited_for: str) -> events.Failed | None:
    """The failure of a process that waited for another one in vain, by the text of its error or the end of its log; None when it is
    something else. `waited_for` names the other one, where that is known."""
    if not any(text in said for text in PEER):
        return None
    who = f"{waited_for[0].upper()}{waited_for[1:]}" if waited_for else "One of the processes that train this job"
    hint = "Look at the attempt's log, and at the GPU and the machine of that process. The job goes on from its newest checkpoint."
    return events.Failed(kind="worker_lost", message=f"{who} ended or hangs: the others waited for it in vain.", hint=hint)


OUT_OF_MEMORY = "out_of_memory"
"""A file in an attempt's folder: the GPU ran out of memory while not every layer was recomputed."""


def memory_ran_out(runs: Path) -> bool:
    """Whether an earlier attempt of the job whose attempts are in `runs` left that file."""
    return any(runs.glob(f"a*/{OUT_OF_MEMORY}"))


def disk_is_full(error: BaseException) -> bool:
    """Whether an error means a full disk. `DiskFull` is an OSError too; safetensors wraps the system's error in its own, so the
    text is checked."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or "No space left on device" in str(error) or "os error 28" in str(error)


class Diverged(StudioError):
    """The loss was not finite several times in a row, or rose far above its start."""

    code = "diverged"
