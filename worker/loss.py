"""Cross-entropy of the language-model head that never holds all logits.

The head is applied only where a token is learnt, a few hundred positions at a time; the gradient with respect to the hidden
states is made in the same pass, so a chunk's logits live once and are gone. (The idea of Wijmans et al. 2024, Cut Your
Losses, and of Liger's fused linear cross-entropy, in plain torch.)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

CHUNK_BYTES = 48 * 2**20
"""Size of one chunk of float32 logits. Small enough to stay near the caches, large enough to keep the products busy."""


class Head(NamedTuple):
    """The last linear layer and what some models do to its logits: `cap` · tanh(logits · `scale` / `cap`)."""

    weight: torch.Tensor  # (V, H)
    bias: torch.Tensor | None
    scale: float = 1.0
    cap: float | None = None


def head_of(model: torch.nn.Module) -> Head:
    """The head of a transformers language model."""
    layer, config = model.get_output_embeddings(), model.config
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    divisor = float(getattr(config, "logits_scaling", None) or 1.0)
    return Head(layer.weight, getattr(layer, "bias", None), scale / divisor, getattr(config, "final_logit_softcapping", None))


CHUNK_BYTES_CUDA = 2**30
"""The same on a GPU, whose products want thousands of rows: 2,048 rows of 128,256 logits in float32."""


def chunk_rows(vocabulary: int, rows: int, cuda: bool = False) -> int:
    return max(16, min(rows, (CHUNK_BYTES_CUDA if cuda else CHUNK_BYTES) // (4 * vocabulary)))


def _chunk(hidden: torch.Tensor, head: Head, compute: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Float32 logits of a chunk, and tanh of the capped ones, which the gradient needs."""
    logits = F.linear(hidden.to(compute), head.weight.to(compute)).float()
    if head.bias is not None:
        logits += head.bias.float()
    if head.scale != 1.0:
        logits *= head.scale
    if head.cap is None:
        return logits, None
    bent = torch.tanh_(logits.div_(head.cap))
    return bent * head.cap, bent


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, rest: Any) -> Any:
        head, compute = Head(weight, bias, *rest[0]), rest[1]
        if hidden.is_cuda and head.bias is None and head.scale == 1.0 and head.cap is None and compute != torch.float32:
            return _on_gpu(ctx, hidden, weight, targets, compute)
        kept = (targets >= 0)[:, None] if hidden.is_cuda else None  # only packs for a GPU have filling places
        targets = targets if kept is None else targets.clamp(min=0)
        needs_hidden, needs_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        rows = chunk_rows(weight.shape[0], hidden.shape[0], hidden.is_cuda)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        cast = weight.to(compute)
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            logits, bent = _chunk(hidden[part], head._replace(weight=cast), compute)
            picked = logits.gather(1, targets[part, None])
            # One pass for the largest logit, one for the exponentials in place, so the chunk is never copied.
            top = logits.amax(1, keepdim=True)
            p = logits.sub_(top).exp_()
            mass = p.sum(1, keepdim=True)
            nats = mass.log() + top - picked
            total += nats.sum() if kept is None else (nats * kept[part]).sum()
            if d_hidden is None and d_weight is None:
                continue
            p.div_(mass).scatter_add_(1, targets[part, None], torch.full_like(picked, -1.0))  # d loss / d logits
            if kept is not None:
                p.mul_(kept[part])
            if bent is not None:
                p.mul_(1 - bent.square())
            if head.scale != 1.0:
                p.mul_(head.scale)
            if d_bias is not None:
                d_bias += p.sum(0)
            p = p.to(compute)
            if d_hidden is not None:
                d_hidden[part] = p @ cast
            if d_weight is not None:
                if compute == torch.float32:
                    d_weight.addmm_(p.t(), hidden[part].float())
                else:
                    d_weight += p.t() @ hidden[part].to(compute)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        scaled = [None if g is None else g.mul_(grad.to(g.dtype)) for g in ctx.saved_tensors]
        return scaled[0], scaled[1], scaled[2], None, None


def _on_gpu(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, compute: torch.dtype) -> torch.Tensor:
    """The same with logits in `compute`, made into their gradient in place by one kernel. A target below 0 is left out."""
    from worker.softmax import softmax_gradient_

    needs_hidden, needs_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
    source, cast = hidden.to(compute), weight.to(compute)
    rows = max(256, chunk_rows(weight.shape[0], hidden.shape[0], True) // 256 * 256)
    losses = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    d_hidden = torch.empty_like(source) if needs_hidden else None
    d_weight: torch.Tensor | None = None
    for start in range(0, hidden.shape[0], rows):
        part = slice(start, start + rows)
        logits = source[part] @ cast.t()
        softmax_gradient_(logits, targets[part], losses[part])
        if d_hidden is not None:
            torch.mm(logits, cast, out=d_hidden[part])
        if needs_weight:
            more = torch.mm(logits.t(), source[part], out_dtype=torch.float32)
            d_weight = more if d_weight is None else d_weight.add_(more)
        del logits
    ctx.save_for_backward(d_hidden if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, None)
    return losses.sum()


def linear_cross_entropy(hidden: torch.Tensor, head: Head, targets: torch.Tensor, compute: torch.dtype = torch.float32) -> torch.Tensor:
    """Sum of the cross-entropy, in nats, of `hidden` (K, H) against `targets` (K,); products in `compute`, sums in float32.

    Gradients flow to `hidden` and, where they are trained, to the head's weight and bias.
    """
    if hidden.shape[0] == 0:
        return hidden.sum() * 0.0
    with torch.autocast(hidden.device.type, enabled=False):
        return _LinearCrossEntropy.apply(hidden, head.weight, head.bias, targets, ((head.scale, head.cap), compute))


@torch.no_grad()
def score(
    hidden: torch.Tensor, head: Head, targets: torch.Tensor, compute: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy in nats and whether the likeliest token is the right one, for each of K positions."""
    losses, hits = [], []
    rows = chunk_rows(head.weight.shape[0], max(hidden.shape[0], 1), hidden.is_cuda)
    with torch.autocast(hidden.device.type, enabled=False):
        for h, t in zip(hidden.split(rows), targets.split(rows), strict=True):
            logits, _ = _chunk(h, head, compute)
            losses.append(F.cross_entropy(logits, t, reduction="none"))
            hits.append(logits.argmax(1) == t)
    return torch.cat(losses), torch.cat(hits)
