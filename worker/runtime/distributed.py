"""Distributed training of one job: processes started by torchrun; a single process has world size 1.

Data parallel: each process holds the whole model, computes its share of the packs of every step, and gradients are summed by
all-reduce in flat buckets. The packs of a step, and so the result, are those of one process with gradient accumulation, up to
rounding. Only rank 0 evaluates, saves and reports; the others follow its decisions after each step.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import os
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from app.errors import DoesNotFit
from app.kit.child_process import die_with_parent
from app.planning.memory import passes
from app.spec import JobSpec
from app.strategies import Strategy
from worker.runtime import devices
from worker.runtime.attendance import Attendance

MESSAGE_BYTES = 64 * 2**20
"""Bucket size of the all-reduce: an adapter fits in one, and a whole model needs no second copy of all gradients."""

PATIENCE = datetime.timedelta(days=7)
"""Timeout for waiting for rank 0, which evaluates and saves alone. torchrun ends the others where it dies."""

STEP_PATIENCE = datetime.timedelta(minutes=15)
"""Timeout of a collective of a step: a process that hangs ends the attempt within it, and another resumes the job. The longest passes
between two of them, of many packs on a slow GPU, take minutes. After it gloo raises in every process that waits; NCCL's watchdog ends
them (`TORCH_NCCL_ASYNC_ERROR_HANDLING`, which torchrun sets to 1)."""


def size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def spreads(strategy: Strategy) -> bool:
    """Whether a job's processes shard the trained weights (FSDP) instead of holding them all."""
    return size() > 1 and not type(strategy).adapter


@dataclass(frozen=True)
class ProcessGroup:
    rank: int = 0
    size: int = 1
    host: Any = None  # a gloo group over the hosts' network, for decisions that no GPU has to wait for
    attendance: Attendance | None = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def _come(self) -> None:
        if self.attendance is not None:
            self.attendance.come()

    def share(self, window: Sequence[Any]) -> Sequence[Any]:
        """This rank's packs of a step."""
        return window[self.rank :: self.size]

    def agree(self, *wishes: bool) -> list[bool]:
        """Each wish or'ed over all processes, so that all decide alike whichever of them was asked."""
        if self.size == 1:
            return list(wishes)
        told = torch.tensor([int(w) for w in wishes])
        self._come()
        dist.all_reduce(told, dist.ReduceOp.MAX, group=self.host)
        return [bool(v) for v in told]

    def maximum(self, number: int) -> int:
        """The maximum of a number over all processes."""
        if self.size == 1:
            return number
        told = torch.tensor(number)
        self._come()
        dist.all_reduce(told, dist.ReduceOp.MAX, group=self.host)
        return int(told)

    def tell(self, found: Any) -> Any:
        """What the first process has found. It may take minutes, as `wait`."""
        if self.size == 1:
            return found
        told = [found]
        self._come()
        dist.broadcast_object_list(told, 0, group=self.host)
        return told[0]

    def bring_files(self, paths: Sequence[Path]) -> None:
        """Bring the file of each process on another machine, `paths` by rank, to the first process's, a piece at a time. Raises OSError in all
        processes where one of them could not read or write."""
        here = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        failed: OSError | None = None
        for source in range(here, self.size):
            if self.rank == source:
                failed = self._send_file(paths[source])
            elif self.first:
                failed = self._receive_file(paths[source], source) or failed
        if here < self.size and (code := self.maximum((failed.errno or errno.EIO) if failed else 0)):
            raise failed or OSError(code, os.strerror(code), str(paths[0].parent))

    def _send_file(self, path: Path) -> OSError | None:
        """To the first process, which waits for each piece. What cannot be read ends the file as its end does: with an empty piece."""
        failed: OSError | None = None
        try:
            with path.open("rb") as file:
                while piece := file.read(MESSAGE_BYTES):
                    self._send(piece)
            path.unlink()
        except OSError as error:
            failed = error
        self._send(b"")
        return failed

    def _send(self, piece: bytes) -> None:
        dist.send(torch.tensor(len(piece)), 0, group=self.host)
        if piece:
            dist.send(torch.frombuffer(bytearray(piece), dtype=torch.uint8), 0, group=self.host)

    def _receive_file(self, path: Path, source: int) -> OSError | None:
        """What cannot be written is received all the same: the other process is in the middle of sending it."""
        pieces = self._pieces_of(source)
        failed: OSError | None = None
        try:
            with path.open("wb") as file:
                for piece in pieces:
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            failed = error
        for _ in pieces:
            pass
        return failed

    def _pieces_of(self, source: int) -> Iterator[bytes]:
        while True:
            dist.recv(size := torch.tensor(0), source, group=self.host)
            if not int(size):
                return
            dist.recv(piece := torch.empty(int(size), dtype=torch.uint8), source, group=self.host)
            yield piece.numpy().tobytes()

    def wait(self) -> None:
        """Barrier. It may take hours, while rank 0 evaluates; the collectives of a step may not."""
        if self.size > 1:
            self._come()
            dist.barrier(group=self.host)

    def sum_(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace each tensor by its sum over all processes."""
        if self.size == 1:
            return
        self._come()
        for batch in _batches(tensors):
            flat = torch.cat([t.reshape(-1) for t in batch])
            dist.all_reduce(flat)
            for tensor, part in zip(batch, flat.split([t.numel() for t in batch]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sum the gradients over all processes; a parameter without a gradient in one of them counts as zero there."""
        if self.size == 1:
            return
        with torch.no_grad():
            found = list(parameters)
            for p in found:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
            self.sum_(p.grad for p in found if p.grad is not None)

    def broadcast(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Broadcast the parameters of rank 0, whatever was initialized at random."""
        if self.size > 1:
            self._come()
            for p in parameters:
                dist.broadcast(p.data, 0)

    def each(self, number: float) -> list[float]:
        """The number of every process, by rank."""
        if self.size == 1:
            return [number]
        told = torch.zeros(self.size, dtype=torch.float64)
        told[self.rank] = number
        self._come()
        dist.all_reduce(told, group=self.host)
        return told.tolist()

    def count(self, *numbers: int) -> list[int]:
        """Sums of numbers over all processes."""
        if self.size == 1:
            return list(numbers)
        told = torch.tensor(numbers, dtype=torch.int64)
        self._come()
        dist.all_reduce(told, group=self.host)
        return told.tolist()


class Laps:
    """How long the passes of each step take in this process, without the time it waits for others. On a GPU they are timed by events,
    which nothing waits for."""

    SLOW, STEPS = 1.3, 20

    def __init__(self, world: ProcessGroup, device: torch.device) -> None:
        self.world, self.kind = world, devices.of(device)
        self.laps: list[tuple[Any, Any]] = []
        self.warned = False

    def now(self) -> Any:
        return self.kind.event(timing=True)

    def note(self, began: Any) -> None:
        if self.world.size > 1:
            self.laps.append((began, self.now()))

    def slow(self) -> str | None:
        """Every `STEPS` steps, and in every process: which one takes much longer than the others, said once; else None. The passes of one
        step differ with their packs, those of twenty hardly do."""
        if len(self.laps) < self.STEPS:
            return None
        # Not the first, in which kernels are compiled and loaded; and the newest may still be computed.
        done, self.laps = self.laps[1:-1], self.laps[-1:]
        spent = sum(began.elapsed_time(end) for began, end in done) / 1000
        each = self.world.each(spent / len(done))
        middle, slowest = statistics.median_low(each), max(each)
        if self.warned or slowest < self.SLOW * middle:
            return None
        self.warned = True
        return (
            f"Process {each.index(slowest)} of {self.world.size} takes {slowest:.2g} s for its part of a step, the others {middle:.2g} s: all "
            "wait for it. Another program on its GPU, heat or a slower slot are the usual reasons."
        )


def _batches(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Consecutive tensors of one dtype, grouped up to the bucket size."""
    held: list[torch.Tensor] = []
    size = 0
    for tensor in tensors:
        if held and (tensor.dtype != held[0].dtype or size + tensor.nbytes > MESSAGE_BYTES):
            yield held
            held, size = [], 0
        held.append(tensor)
        size += tensor.nbytes
    if held:
        yield held


@contextlib.contextmanager
def together(device: torch.device, folder: Path) -> Iterator[ProcessGroup]:
    """The process group that torchrun's environment describes, destroyed on exit. How far each process is goes into `folder`, the
    attempt's, which all of them see."""
    if size() == 1:
        yield ProcessGroup()
        return
    die_with_parent(os.getppid())()  # torchrun gives each a session of its own, which a kill of the trainer's group would not reach
    # With its device known NCCL connects at once rather than at the first collective, and a process cannot take another's GPU.
    own = device if devices.is_gpu(device) else None
    dist.init_process_group(devices.of(device).collectives, timeout=STEP_PATIENCE, device_id=own)
    attendance = Attendance(folder, dist.get_rank())
    try:
        yield ProcessGroup(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=PATIENCE), attendance)
    finally:
        attendance.close()
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def spread(spec: JobSpec) -> JobSpec:
    """The spec with a step's tokens or rows split evenly over at least as many passes as there are processes. Raises DoesNotFit
    where its rows cannot be split."""
    run, count = spec.run, passes(spec.run, size())
    if count == run.passes:
        return spec
    batches = run.gradient_accumulation_steps
    whole = {name: getattr(run, name) and getattr(run, name) * batches for name in ("max_tokens_per_step", "batch_size")}
    if whole["batch_size"] and whole["batch_size"] % count:
        raise DoesNotFit(
            f"{whole['batch_size']} rows of a step cannot be shared out evenly to {size()} processes in {count} passes.",
            hint=f"Take a batch size that {count} divides, or set the batch in tokens.",
            param="batch_size",
        )
    return spec.model_copy(update={"run": run.model_copy(update={**whole, "micro_batches": count, "gradient_accumulation_steps": 1})})
