"""NVIDIA's GPUs, and AMD's: torch for ROCm has them under the same names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from worker.runtime.devices._base import Gpu, Graph


class Cuda(Gpu):
    kind = "cuda"
    collectives = "nccl"
    activity = torch.profiler.ProfilerActivity.CUDA

    def use(self, place: int) -> torch.device:
        torch.backends.cuda.matmul.allow_tf32 = True
        return super().use(place)

    def set_up(self) -> None:
        # On Hopper and Blackwell torch prefers cuDNN's attention, which plans every new shape for some tenths of a second, and in
        # generation every token has a new one. Packs have an attention of their own (`worker/modeling/packed_attention.py`).
        torch.backends.cuda.enable_cudnn_sdp(False)

    def capability(self, device: torch.device) -> tuple[int, int]:
        return torch.cuda.get_device_capability(device)

    def capture(self, run: Callable[[], torch.Tensor], *, warm: bool = True) -> Graph:
        return CudaGraph(run, warm)


class CudaGraph:
    """All graphs of a process share one memory pool: a result is read before the next replay."""

    pool: Any = None

    def __init__(self, run: Callable[[], torch.Tensor], warm: bool) -> None:
        CudaGraph.pool = CudaGraph.pool or torch.cuda.graph_pool_handle()
        if warm:
            run()  # kernels are loaded when they are first used, which a capture does not allow
        self.graph = torch.cuda.CUDAGraph()
        before = torch.cuda.current_stream()
        try:
            # Other threads, which load models meanwhile, may allocate.
            with torch.cuda.graph(self.graph, pool=CudaGraph.pool, capture_error_mode="thread_local"):
                self.out = run()
        finally:
            torch.cuda.set_stream(before)  # a capture that failed leaves its own

    def replay(self) -> None:
        self.graph.replay()
