"""`python -m worker.selftest`: whether each package that only GPU training uses works here, as one line of JSON for `luthier
doctor`.

Each is tried with a small computation on the device itself, since an installed one may still be built for another CUDA version.
"""

from __future__ import annotations

import datetime
import json
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
import torch._dynamo

from worker.runtime import devices


def examine(device: str = devices.GPUS[0]) -> dict[str, dict[str, Any]]:
    """`{part: {"works", "said"}}`, with `said` a version and a measurement, or the first line of the error."""
    tries: dict[str, Callable[[torch.device], str]] = {
        "torch": products, "attention": attention, "triton": triton, "compiler": compiler, "bitsandbytes": bits, "fp8": fp8,
        "nccl": several,
    }  # fmt: skip
    found = {}
    for name, body in tries.items():
        try:
            found[name] = {"works": True, "said": body(torch.device(device))}
        except Exception as error:
            found[name] = {"works": False, "said": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    return found


def products(device: torch.device) -> str:
    x = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    assert float((x @ x).sum()) == 16**3
    gpu = devices.gpu_of(device)
    if gpu is None:
        return f"{torch.__version__} on the processor"
    capability = gpu.capability(device)
    return f"{torch.__version__} on {gpu.name(device)}" + (f", capability {'.'.join(map(str, capability))}" if capability else "")


def attention(device: torch.device) -> str:
    """As jobs take it: two sequences in a pack, and two heads of queries to one of keys."""
    from worker.modeling.packed_attention import packed_attention, varlen_attn

    assert varlen_attn is not None, "torch before 2.10 has no variable-length attention"
    capability = gpu.capability(device) if (gpu := devices.gpu_of(device)) is not None else None
    assert capability is None or capability >= (8, 0), "GPUs before Ampere have no kernel for it"
    torch.manual_seed(0)
    given = [torch.randn(1, heads, 32, 32, device=device) for heads in (4, 2, 2)]
    ends, found = torch.tensor([0, 12, 32], dtype=torch.int32, device=device), []
    for dtype, packs in ((torch.float32, {"sequence_lengths": [12, 20]}), (torch.bfloat16, {"cu_seq_lens": ends, "longest": 32})):
        q, k, v = (x.to(dtype).requires_grad_() for x in given)
        out, _ = packed_attention(torch.nn.Module(), q, k, v, None, **packs)
        out.float().square().sum().backward()
        found.append([out, q.grad, k.grad, v.grad])
    for ours, wanted in zip(*reversed(found), strict=True):
        assert ours is not None and wanted is not None
        apart = float((ours.float() - wanted).norm() / wanted.norm())
        assert apart < 0.03, f"attention or a gradient is {apart:.1%} off"  # a NaN is not less
    return "forwards and backwards, with grouped heads"


def triton(device: torch.device) -> str:
    from worker.kernels.gpu.cross_entropy import softmax_gradient_

    logits, targets = torch.randn(4, 300, device=device), torch.tensor([0, 7, 299, -100], device=device)
    losses = torch.empty(4, device=device)
    wanted = torch.nn.functional.cross_entropy(logits, targets, reduction="none", ignore_index=-100)
    softmax_gradient_(logits, targets, losses)
    apart = float((losses - wanted).abs().max())
    assert apart < 1e-4, f"a loss is {apart:.1e} off"
    return f"{metadata.version('triton')}, a loss within {apart:.0e}"


def compiler(device: torch.device) -> str:
    """One graph through torch's compiler, which a job only reports to have given up."""
    weight = torch.randn(64, 64, device=device)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(x @ weight) * x

    x = torch.randn(32, 64, device=device, requires_grad=True)
    wanted, began = layer(x).sum(), time.monotonic()
    with torch._dynamo.config.patch(suppress_errors=False):
        found = torch.compile(layer, fullgraph=True)(x).sum()
        found.backward()
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    return f"a layer forwards and backwards in {time.monotonic() - began:.0f} s"


def bits(device: torch.device) -> str:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from worker.training.optim import make_optimizer, optimizer_step

    weight = torch.randn(128, 64, device=device)
    apart = float((dequantize_4bit(*quantize_4bit(weight, quant_type="nf4")) - weight).abs().mean())
    assert apart < 0.2, f"4-bit weights are {apart:.2f} off"
    learnt = torch.nn.Parameter(weight.clone())
    optimizer = make_optimizer({"weight": learnt}, 1e-3, 0.0, "adamw_8bit")
    learnt.grad = torch.ones_like(weight)
    optimizer_step(optimizer, torch.ones((), device=device))
    assert bool(((weight - learnt.detach() - 1e-3).abs() < 1e-5).all()), "8-bit AdamW took a wrong step"
    return f"{metadata.version('bitsandbytes')}, nf4 and 8-bit AdamW"


def fp8(device: torch.device) -> str:
    from worker.kernels.gpu import fp8

    torch.manual_seed(0)
    x, weight = torch.randn(32, 64, device=device).bfloat16(), torch.randn(48, 64, device=device).bfloat16()
    if reason := fp8.why_not(device):
        raise RuntimeError(reason)
    wanted = x.float() @ weight.float().t()
    apart = float((fp8.product(x, *fp8.quantize(weight)).float() - wanted).norm() / wanted.norm())
    assert apart < 0.06, f"a product is {apart:.1%} off"
    return f"products within {apart:.1%}"


def several(device: torch.device) -> str:
    """A sum over two processes, one for each of two GPUs, as jobs with `LUTHIER_GPUS_PER_JOB` take it."""
    from torch.multiprocessing.spawn import spawn

    if (gpu := devices.gpu_of(device)) is not None and gpu.count() < 2:
        return "not tried: one GPU"
    with tempfile.TemporaryDirectory() as folder:
        spawn(_sum, (device.type, f"file://{folder}/meet"), nprocs=2)
    return f"two processes add up through {devices.of(device).collectives}"


def _sum(rank: int, kind: str, meet: str) -> None:
    import torch.distributed as dist

    own = torch.device(kind, rank) if kind in devices.GPUS else None
    wait = datetime.timedelta(seconds=60)
    dist.init_process_group(devices.DEVICES[kind].collectives, init_method=meet, rank=rank, world_size=2, timeout=wait, device_id=own)
    x = torch.full((1000,), float(rank + 1), device=own or "cpu")
    dist.all_reduce(x)
    assert float(x.sum()) == 3000.0, "a sum over two processes is wrong"
    dist.destroy_process_group()


if __name__ == "__main__":
    print(json.dumps(examine()))
