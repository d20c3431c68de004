"""Compiles the CPU kernels before the first job needs them, in a process that each worker starts:

    python -m worker.kernels.cpu.warmup

They are cached on disk for all later jobs (`worker/kernels/cpu/jit.py`). It takes about ten seconds of one core, once for each
version.
"""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

from app.kit.child_process import die_with_parent
from app.machines.hardware import this_machine
from app.settings import PROJECT
from worker import kernels
from worker.runtime import kernel_cache


def begin() -> subprocess.Popen | None:
    """Start compiling where the cache is empty and training runs on the CPU; the child ends with this process at the latest."""
    from worker.supervision import exit_codes

    if this_machine().cuda or not kernels.allowed() or kernel_cache.folder().exists():
        return None
    return subprocess.Popen(
        [sys.executable, "-m", "worker.kernels.cpu.warmup"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        cwd=PROJECT,
        env=exit_codes.trainer_environment(os.environ),
        preexec_fn=die_with_parent(),
    )


def compile_all() -> None:
    """Call every kernel once, forward and backward, with each combination of dtypes that a job uses."""
    import torch

    from worker.kernels.cpu import adamw, jit, lora_products, lora_step
    from worker.kernels.cpu import attention as amx_attention
    from worker.kernels.cpu.cross_entropy import softmax_loss_
    from worker.kernels.cpu.gated_mlp import SILU, gated, gated_back
    from worker.kernels.cpu.rms_norm import rms_norm
    from worker.kernels.cpu.rotary import rotate
    from worker.runtime.thread_parallel import ThreadParallel

    if not jit.is_available():
        return
    half, full = torch.bfloat16, torch.float32
    for given, kind, wanted in ((half, half, half), (half, full, half), (full, full, half), (full, full, full)):
        x = torch.ones(1, 1, 4, 32, dtype=given, requires_grad=True)
        rms_norm(x, torch.ones(32, dtype=kind), 1e-6, wanted).square().sum().backward()
    for given, table, rounds in ((half, half, False), (half, full, False), (half, full, True), (full, full, False)):
        q, angles = torch.ones(1, 1, 4, 32, dtype=given, requires_grad=True), torch.ones(1, 4, 32, dtype=table)
        with torch.autocast("cpu", half, enabled=rounds):
            rotated = rotate(q, q, angles, angles)[0]
        rotated.square().sum().backward()  # of a square: the gradient of a plain sum is an expanded tensor, with strides 0
    for kind in (half, full):
        x = torch.ones(4, 32, dtype=kind)
        gated_back(x, x, gated(x, x, SILU), SILU, again=True)
        softmax_loss_(x, torch.zeros(4, dtype=torch.long), torch.empty(4))
    weight, moments, gradient = torch.ones(1, 32), torch.zeros(2, 1, 32), torch.zeros(1, 32, dtype=half)
    pieces = adamw.SplitGradient(gradient, gradient, (1.0, 0.0), torch.zeros(1, 32), None)
    adamw.squares(pieces, 0, 1)
    adamw.move_(
        adamw.AdamWState(weight, moments[0], moments[1], gradient), pieces, adamw.AdamWParams(1e-3, 0.0, (0.9, 0.999), 1e-8), 1, 1.0, 0, 1
    )
    if amx_attention.is_available():
        q = torch.ones(1, 1, 4, 32, dtype=half, requires_grad=True)
        amx_attention.attention(q, q, q, [4], amx_attention.Rules(1.0, True, 0)).sum().backward()
    if lora_products.is_available():
        down, up, x = (torch.nn.Parameter(torch.ones(size, 32)[:, :width]) for size, width in ((1, 32), (32, 1), (32, 32)))
        own = lora_step.LoraLayerState([down], [up], [1.0], x.detach().to(half), None, ThreadParallel(1), 1)
        lora_step.Product.apply(x.to(half), own, down).float().sum().backward()
        lora_optimizer = lora_step.LoraOptimizer([SimpleNamespace(own=own)], torch.optim.AdamW([down, up]), own.abreast)
        lora_optimizer.squares()
        lora_optimizer.move(1.0)


if __name__ == "__main__":
    os.nice(10)
    compile_all()
