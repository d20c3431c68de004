"""Per-token log-probabilities with gradients, without ever holding all logits.

`worker/modeling/cross_entropy.py` sums over all positions and so can compute the gradients in its forward pass. Here each
position has a weight that is known only afterwards (in DPO, the weight of its pair). The loss of a position depends only on the
hidden state there, so its gradient is computed in the forward pass too and scaled row by row in the backward pass; only a
trainable head needs its chunks of logits a second time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from worker import kernels
from worker.modeling.cross_entropy import Head, chunk_rows, pad_to_multiple, plain_nats
from worker.runtime import devices


def chunk_logits(hidden: torch.Tensor, weight: torch.Tensor, head: Head, wide: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits (rows, V) of a chunk in the dtype `wide`, and tanh of the capped ones, which the gradient needs."""
    logits = F.linear(hidden.to(weight.dtype), weight).to(wide)
    if head.bias is not None:
        logits = logits + head.bias.to(wide)
    if head.scale != 1.0:
        logits = logits * head.scale
    if head.cap is None:
        return logits, None
    bent = torch.tanh(logits / head.cap)
    return bent * head.cap, bent


def _gradient(logits: torch.Tensor, bent: torch.Tensor | None, targets: torch.Tensor, scale: float) -> torch.Tensor:
    """d nats / d (hidden · weightᵀ), (rows, V)."""
    p = logits.softmax(1)
    p.scatter_add_(1, targets[:, None], torch.full_like(p[:, :1], -1.0))
    if bent is not None:
        p.mul_(1 - bent.square())
    return p.mul_(scale) if scale != 1.0 else p


class _TokenNats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, rest: Any) -> Any:
        head, compute = Head(weight, bias, *rest[0]), rest[1]
        wide = torch.promote_types(compute, torch.float32)
        # On a GPU a logit exists as the product, in float32, as a probability and as its gradient: 2 + 4 + 4 + 2 bytes.
        gpu = devices.is_gpu(hidden.device)
        rows = chunk_rows(weight.shape[0], hidden.shape[0], gpu, 12 if gpu else 8)
        cast = head.weight_in(compute)
        nats = torch.empty(hidden.shape[0], dtype=wide, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            logits, bent = chunk_logits(hidden[part], cast, head, wide)
            nats[part] = F.cross_entropy(logits, targets[part], reduction="none")
            if d_hidden is not None:
                d_hidden[part] = _gradient(logits, bent, targets[part], head.scale).to(compute) @ cast
        # The head's own gradient needs the weights of the positions; its inputs are kept only where it is trained.
        learns = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ctx.save_for_backward(d_hidden, *((hidden, weight, bias, targets) if learns else (None,) * 4))
        ctx.rest, ctx.rows = rest, rows
        return nats

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        d_hidden, hidden, weight, bias, targets = ctx.saved_tensors
        if d_hidden is not None:
            d_hidden = d_hidden * grad[:, None].to(d_hidden.dtype)
        d_weight = d_bias = None
        if hidden is not None:
            d_weight, d_bias = _head_gradient(hidden, Head(weight, bias, *ctx.rest[0]), targets, ctx.rest[1], grad, ctx.rows)
        return d_hidden, d_weight if ctx.needs_input_grad[1] else None, d_bias if ctx.needs_input_grad[2] else None, None, None


def _head_gradient(
    hidden: torch.Tensor, head: Head, targets: torch.Tensor, compute: torch.dtype, grad: torch.Tensor, rows: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    wide = torch.promote_types(compute, torch.float32)
    d_weight = torch.zeros_like(head.weight, dtype=wide)
    d_bias = torch.zeros_like(head.bias, dtype=wide) if head.bias is not None else None
    cast = head.weight_in(compute)
    for start in range(0, hidden.shape[0], rows):
        part = slice(start, start + rows)
        logits, bent = chunk_logits(hidden[part], cast, head, wide)
        p = _gradient(logits, bent, targets[part], head.scale).mul_(grad[part, None])
        if d_bias is not None:
            d_bias += p.sum(0)
        d_weight += p.to(compute).t() @ hidden[part].to(compute)
    return d_weight, d_bias


def token_nats(hidden: torch.Tensor, head: Head, targets: torch.Tensor, compute: torch.dtype = torch.float32) -> torch.Tensor:
    """Minus the log-probability, in nats, of each of `targets` (K,) after `hidden` (K, H); products in `compute`.

    Float32, or float64 where `compute` is. Gradients flow to `hidden` and, where they learn, to the head's weight and bias.
    """
    if not kernels.allowed():
        return plain_nats(hidden, head, targets, compute)
    count = hidden.shape[0]
    with torch.autocast(hidden.device.type, enabled=False):
        hidden, targets = pad_to_multiple(hidden, targets, compute, value=0)
        return _TokenNats.apply(hidden, head.weight, head.bias, targets, (head[2:], compute))[:count]
