"""Where the time of a training step goes, and how far that is from what the machine could do.

    python -m worker.run --profile …

writes `profile/trace.json` (open it in Perfetto or chrome://tracing) and `profile/summary.txt` into the attempt's folder: the
share of each kind of work, the floor (operations over the speed of a large product, bytes over the speed of a copy, both
measured here), and the largest gap. The steps before the window warm up; those after it run as always.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from app import events
from app.objectives import OBJECTIVES
from app.planning.duration import operations_per_token
from app.spec import JobSpec
from worker.runtime import devices

WARM_STEPS = 3
STEPS = 3

KINDS: dict[str, tuple[str, ...]] = {
    "attention": ("scaled_dot_product", "flash", "varlen", "fmha", "_attention"),
    "optimizer and clipping": ("adam", "_foreach", "multi_tensor_apply", "linalg_vector_norm", "lpnorm", "clip"),
    "matrix products": ("aten::mm", "addmm", "bmm", "linear", "gemm", "cutlass", "nvjet", "matmul"),
    "cross-entropy": ("softmax", "cross_entropy", "crossentropy", "scatter_add", "exp_", "gather", "amax"),
    "norms": ("rms_norm", "rmsnorm", "layer_norm", "layernorm"),
    "between processes": ("nccl", "gloo", "all_reduce", "allreduce", "all_gather", "reduce_scatter"),
    "copies and casts": ("copy", "clone", "contiguous", "cat", "memcpy", "memset", "_to_copy", "fill", "zero_"),
    "activations and other element-wise work": (
        *("gated", "rotary"),
        *("mul", "add", "silu", "sigmoid", "neg", "sub", "div", "triton", "sum", "pow", "cos", "sin", "elementwise", "reduce"),
    ),
}
"""Kinds of work by what an operation's or a GPU kernel's name contains; the first that fits counts."""

WAITING = "waiting between operations"
"""Wall time in which nothing above ran: a GPU without work, or Python between the operations of a processor."""


class ProfileWindow(NamedTuple):
    """What was recorded."""

    tokens: int
    trained: int
    seconds: float
    length: float  # tokens of a row, on average
    parts: int = 1  # threads that computed parts of a pack side by side


def profiled(told: Iterable[events.TrainerEvent], spec: JobSpec, folder: Path) -> Iterator[events.TrainerEvent]:
    """The same events, with a few steps recorded on the way."""
    recorder: Any = None
    began, done, length, parts = 0.0, 0, 0.0, 1
    first: events.Step | None = None
    for event in told:
        yield event
        if isinstance(event, events.Started):
            length, parts = event.train_tokens / max(event.train_rows, 1), event.details.get("parts", 1)
        if not isinstance(event, events.Step):
            continue
        done += 1
        if done == WARM_STEPS:
            recorder, began, first = _start(), time.perf_counter(), event
        elif done == WARM_STEPS + STEPS and recorder is not None and first is not None:
            devices.best().synchronize()
            seconds = time.perf_counter() - began
            recorder.stop()
            seen = ProfileWindow(event.tokens - first.tokens, event.trained_tokens - first.trained_tokens, seconds, length, parts)
            summary = _write(recorder, spec, folder / "profile", seen)
            yield events.Log(level="info", message=summary)
            recorder = None
    if recorder is not None:
        recorder.stop()
        yield events.Log(level="warn", message=f"The job ended before {WARM_STEPS + STEPS} steps, so there is no profile.")


def _start() -> Any:
    from torch.profiler import _ExperimentalConfig, profile  # type: ignore[attr-defined]

    kinds = list(dict.fromkeys(one.activity for one in (devices.CPU, devices.best())))
    devices.best().synchronize()
    recorder = profile(activities=kinds, acc_events=True, experimental_config=_ExperimentalConfig(profile_all_threads=True))
    recorder.start()
    return recorder


def _write(recorder: Any, spec: JobSpec, folder: Path, seen: ProfileWindow) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    recorder.export_chrome_trace(str(folder / "trace.json"))
    spent = {kind: took / seen.parts for kind, took in shares(recorder.key_averages()).items()}
    spent[WAITING] = max(0.0, seen.seconds - sum(spent.values()))
    text = summary(spec, spent, seen, *machine_speeds())
    (folder / "summary.txt").write_text(text + "\n")
    return text


def shares(averages: Iterable[Any]) -> dict[str, float]:
    """Seconds of each kind of work: on the device where there is one, else the processor's own time of each operation."""
    gpu = devices.gpu()
    found = dict.fromkeys(KINDS, 0.0) | {"other": 0.0}
    for one in averages:
        took = (one.self_device_time_total if gpu else one.self_cpu_time_total) / 1e6
        if gpu and one.device_type == torch.autograd.DeviceType.CPU:  # type: ignore[attr-defined]
            continue  # launches; the kernels stand beside them
        found[kind_of(one.key)] += took
    return found


def kind_of(operation: str) -> str:
    name = operation.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")


def summary(spec: JobSpec, spent: dict[str, float], seen: ProfileWindow, operations: float, bandwidth: float) -> str:
    """The page a person reads. `operations` and `bandwidth` are per second, of this machine."""
    tokens, seconds = seen.tokens, seen.seconds
    work, moved = floor_of(spec, seen)
    floor = max(work / operations, moved / bandwidth)
    total = sum(spent.values()) or 1.0
    largest = max((kind for kind in spent if kind != "matrix products"), key=spent.__getitem__)
    above = spent["matrix products"] - work / operations
    gap = f"{largest} ({spent[largest] / total:.0%} of the time)"
    if above > spent[largest]:
        gap = f"matrix products that run below the speed of a large one ({above / total:.0%} of the time)"
    lines = [
        f"{STEPS} steps, {tokens} tokens, {seconds:.3f} s: {tokens / seconds:.0f} tokens/s",
        *(f"  {share / total:6.1%}  {share:8.3f} s  {kind}" for kind, share in sorted(spent.items(), key=lambda item: -item[1])),
        f"Floor: {work / 1e12:.2f} T operations at {operations / 1e12:.2f} T/s take {work / operations:.3f} s; "
        f"{moved / 1e9:.1f} GB of weights at {bandwidth / 1e9:.0f} GB/s take {moved / bandwidth:.3f} s.",
        f"The steps took {seconds / floor:.1f} times the floor. Largest gap: {gap}.",
    ]
    return "\n".join(lines)


def floor_of(spec: JobSpec, seen: ProfileWindow) -> tuple[float, float]:
    """(operations, bytes of weights and optimizer state) that the recorded steps cannot do without.

    Causal attention over a row of L tokens multiplies L²/2 pairs twice forwards and five times backwards (Dao 2023,
    FlashAttention-2, section 3.1). A frozen weight is read in both passes; one that learns is read and written with its gradient and
    both moments by AdamW: 28 bytes.
    """
    shape, strategy = spec.model.shape, spec.strategy
    attention = 7 * seen.length * shape.heads * shape.head_dim * shape.layers
    beside = OBJECTIVES[spec.task].beside
    work = (operations_per_token(shape, strategy, seen.trained / max(seen.tokens, 1), beside=beside) + attention) * seen.tokens
    learnt = strategy.trainable_parameters(shape)
    bits = type(strategy).base_bits
    width = bits / 8 if bits else 2 if strategy.adapter else 4
    return work, STEPS * (2 * spec.run.passes * shape.parameters() * width + 28 * learnt)


def machine_speeds() -> tuple[float, float]:
    """(operations per second of a large bf16 or float32 product, bytes per second of a copy), the best of a few tries."""
    device, size = devices.best().kind, 8192 if devices.gpu() else 1024
    best = 0.0
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.ones(size, size, device=device, dtype=dtype)
        best = max(best, 2 * size**3 / min(_time(lambda x=x: x @ x) for _ in range(4)))
    x = torch.ones(size * size * 4, device=device)
    y = torch.empty_like(x)
    return best, 2 * x.nbytes / min(_time(lambda: y.copy_(x)) for _ in range(4))


def _time(action: Any) -> float:
    devices.best().synchronize()
    began = time.perf_counter()
    action()
    devices.best().synchronize()
    return time.perf_counter() - began
