"""How an optimizer step is computed: `_base.py` is the readable reference, the other files compute the same faster."""

from __future__ import annotations

import torch

from app.run_settings import RunSettings
from app.strategies import Strategy
from worker import kernels
from worker.kernels.cpu import jit, lora_products
from worker.runtime import distributed
from worker.runtime.device import Compute
from worker.training.backends._base import PlainBackend, StepBackend
from worker.training.backends.graphed import GraphedBackend
from worker.training.backends.loss_scaled import LossScaledBackend
from worker.training.backends.threaded_cpu import CpuPaths, ThreadedCpuBackend


def choose(engine: Compute, strategy: Strategy, run: RunSettings, graphed: bool = False) -> StepBackend:
    """The fastest way for these to take a step here; the plain one with `LUTHIER_KERNELS=plain`, and on a GPU, where the layers alone
    are faster than torch's (`worker/modeling/fused_layers.py:patch_layers`), unless its passes are to be `graphed`. In fp16 the one that
    scales the loss, with and without kernels."""
    if engine.precision == "fp16":
        return LossScaledBackend(engine)
    if not kernels.allowed():
        return PlainBackend(engine)
    if distributed.spreads(strategy):
        from worker.training.backends.fsdp import FsdpBackend  # most jobs do without

        return FsdpBackend(engine)
    if engine.device.type != "cpu":
        return GraphedBackend(engine) if graphed else PlainBackend(engine)
    whole = not type(strategy).adapter
    alone = distributed.size() == 1
    half_adamw = alone and engine.compute == torch.bfloat16 and run.optimizer == "adamw"
    return ThreadedCpuBackend(
        engine,
        CpuPaths(
            own_gradients=not whole,
            master_weights=whole and alone,
            gradient_buffers=whole and half_adamw and run.passes == 1 and jit.is_available(),
            lora_step=not whole and half_adamw and lora_products.is_available(),
        ),
    )
