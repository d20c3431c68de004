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
from typing import Any

import torch

from app import events
from app.estimate import operations_per_token
from app.spec import JobSpec

WARM_STEPS = 3
STEPS = 3

KINDS: dict[str, tuple[str, ...]] = {
    "attention": ("scaled_dot_product", "flash", "varlen", "fmha"),
    "matrix products": ("aten::mm", "addmm", "bmm", "linear", "gemm", "cutlass", "nvjet", "matmul"),
    "cross-entropy": ("softmax", "cross_entropy", "_kernel", "scatter_add", "exp_", "gather"),
    "norms": ("rms_norm", "layer_norm"),
    "optimizer and clipping": ("adam", "_foreach", "linalg_vector_norm", "clip"),
    "copies and casts": ("copy", "clone", "contiguous", "cat", "memcpy", "_to_copy", "fill", "zero_"),
    "activations and other element-wise work": ("mul", "add", "silu", "sigmoid", "neg", "sub", "div", "triton", "sum", "pow", "cos", "sin"),
}
"""Kinds of work by what an operation's name contains; the first that fits counts."""


def profiled(told: Iterable[events.TrainerEvent], spec: JobSpec, folder: Path) -> Iterator[events.TrainerEvent]:
    """The same events, with a few steps recorded on the way."""
    recorder: Any = None
    began, done, first = 0.0, 0, None
    for event in told:
        yield event
        if not isinstance(event, events.Step):
            continue
        done += 1
        if done == WARM_STEPS:
            recorder, began, first = _start(), time.perf_counter(), event
        elif done == WARM_STEPS + STEPS and recorder is not None:
            _wait()
            seconds = time.perf_counter() - began
            recorder.stop()
            summary = _write(
                recorder, spec, folder / "profile", event.tokens - first.tokens, event.trained_tokens - first.trained_tokens, seconds
            )
            yield events.Log(level="info", message=summary)
            recorder = None
    if recorder is not None:
        recorder.stop()
        yield events.Log(level="warn", message=f"The job ended before {WARM_STEPS + STEPS} steps, so there is no profile.")


def _start() -> Any:
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    _wait()
    recorder = profile(activities=kinds, acc_events=True)
    recorder.start()
    return recorder


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _write(recorder: Any, spec: JobSpec, folder: Path, tokens: int, trained: int, seconds: float) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    recorder.export_chrome_trace(str(folder / "trace.json"))
    spent = shares(recorder.key_averages())
    text = summary(spec, spent, tokens, trained, seconds, *machine_speeds())
    (folder / "summary.txt").write_text(text + "\n")
    return text


def shares(averages: Iterable[Any]) -> dict[str, float]:
    """Seconds of each kind of work: on the device where there is one, else the processor's own time of each operation."""
    cuda = torch.cuda.is_available()
    found = dict.fromkeys(KINDS, 0.0) | {"other": 0.0}
    for one in averages:
        took = (one.self_device_time_total if cuda else one.self_cpu_time_total) / 1e6
        if cuda and one.device_type == torch.autograd.DeviceType.CPU:
            continue  # launches; the kernels stand beside them
        found[kind_of(one.key)] += took
    return found


def kind_of(operation: str) -> str:
    name = operation.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")


def summary(spec: JobSpec, spent: dict[str, float], tokens: int, trained: int, seconds: float, operations: float, bandwidth: float) -> str:
    """The page a person reads. `operations` and `bandwidth` are per second, of this machine."""
    shape = spec.model.shape
    work = operations_per_token(shape, spec.strategy, trained / max(tokens, 1)) * tokens
    width = 2 if spec.strategy.adapter else 4
    moved = 3 * shape.parameters() * width * STEPS * spec.run.accumulation  # forwards, backwards, and what the optimizer touches
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


def machine_speeds() -> tuple[float, float]:
    """(operations per second of a large bf16 or float32 product, bytes per second of a copy), the best of a few tries."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 1024
    best = 0.0
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.ones(size, size, device=device, dtype=dtype)
        best = max(best, 2 * size**3 / min(_time(lambda x=x: x @ x) for _ in range(4)))
    x = torch.ones(size * size * 4, device=device)
    y = torch.empty_like(x)
    return best, 2 * x.nbytes / min(_time(lambda: y.copy_(x)) for _ in range(4))


def _time(action: Any) -> float:
    _wait()
    began = time.perf_counter()
    action()
    _wait()
    return time.perf_counter() - began
