"""`python -m worker.selftest`: whether each package that only GPU training uses works here, as one line of JSON for `luthier
doctor`.

Each is tried with a small computation on the device itself, since an installed one may still be built for another CUDA version.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch


def examine(device: str = "cuda") -> dict[str, dict[str, Any]]:
    """`{part: {"works", "said"}}`, with `said` a version and a measurement, or the first line of the error."""
    tries: dict[str, Callable[[torch.device], str]] = {
        "torch": products, "attention": attention, "triton": triton, "bitsandbytes": bits, "fp8": fp8
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
    if device.type != "cuda":
        return f"{torch.__version__} on the processor"
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return f"{torch.__version__} on {torch.cuda.get_device_name(device)}, capability {capability}"


def attention(device: torch.device) -> str:
    from worker.modeling.packed_attention import varlen_attn

    assert varlen_attn is not None, "torch before 2.10 has no variable-length attention"
    q = torch.randn(32, 2, 32, dtype=torch.bfloat16, device=device, requires_grad=True)
    ends = torch.tensor([0, 12, 32], dtype=torch.int32, device=device)
    out: torch.Tensor = varlen_attn(q, q, q, ends, ends, 32, 32, window_size=(-1, 0))  # type: ignore[assignment]  # without `return_aux` it is no tuple
    out.float().sum().backward()
    assert torch.isfinite(out).all() and q.grad is not None and torch.isfinite(q.grad).all()
    return "forwards and backwards"


def triton(device: torch.device) -> str:
    from worker.kernels.gpu.cross_entropy import softmax_gradient_

    logits, targets = torch.randn(4, 300, device=device), torch.tensor([0, 7, 299, -100], device=device)
    losses = torch.empty(4, device=device)
    wanted = torch.nn.functional.cross_entropy(logits, targets, reduction="none", ignore_index=-100)
    softmax_gradient_(logits, targets, losses)
    apart = float((losses - wanted).abs().max())
    assert apart < 1e-4, f"a loss is {apart:.1e} off"
    return f"{metadata.version('triton')}, a loss within {apart:.0e}"


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


if __name__ == "__main__":
    print(json.dumps(examine()))
