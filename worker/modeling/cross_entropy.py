"""Linear cross-entropy: the loss of the language-model head without ever holding all logits.

The head is applied only at positions with a target, a chunk at a time; the gradient of the hidden states is computed in the same
pass, so a chunk's logits are discarded at once. (After Wijmans et al. 2024, Cut Your Losses, https://arxiv.org/abs/2411.09009,
and Liger's fused linear cross-entropy, in plain torch.)

On a CPU a chunk's product is one call, since every call repacks the whole head; its softmax runs row by row
(`worker/kernels/cpu/cross_entropy.py`) or, where logits are capped or have a bias, in blocks of rows in plain torch, so that
these stay in the cores' caches. The gradient overwrites the logits.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from app.strategies._model import transformer
from worker import kernels
from worker.kernels.cpu import jit
from worker.kernels.cpu.cross_entropy import softmax_loss_
from worker.modeling.packed_attention import MULTIPLE
from worker.runtime import devices

log = logging.getLogger(__name__)

CHUNK_BYTES = 96 * 2**20
"""Size of one chunk of logits in the products' dtype. Measured on a CPU with AMX, bf16, milliseconds for 1,000 positions of
49,152 logits, forward and backward: 237 at 24 MiB, 174 at 48, 163 at 96 (345, 285 and 277 without the blocks below)."""

BLOCK_BYTES = 3 * 2**19
"""Size of the float32 rows of one softmax block on a CPU: they stay in a core's L2 cache (usually 1 to 2 MiB)."""


HEAD_ROWS = 8192
"""Rows of the head whose gradient is computed at once."""


@functools.cache
def kernel_works(device: torch.device) -> bool:
    """Whether the Triton kernel of `worker/kernels/gpu/cross_entropy.py` can be built and run on the device; tried once. Triton
    comes with torch's CUDA builds, but needs a C compiler on the machine. Without it the loss uses plain torch, which is slower."""
    try:
        from worker.kernels.gpu.cross_entropy import softmax_gradient_

        softmax_gradient_(torch.zeros(1, 64, device=device), torch.zeros(1, dtype=torch.long, device=device), torch.empty(1, device=device))
    except Exception as error:
        log.warning("The loss uses plain torch, which is slower: %s: %s", type(error).__name__, error)
        return False
    return True


class HeadGradient(NamedTuple):
    """The gradient of a head's weight (V, H), `whole`, or what it is the product of: the logits' gradients (K, V) and the states (K, H)
    of each chunk in turn."""

    whole: torch.Tensor | None
    parts: Sequence[torch.Tensor]

    def pieces(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Some rows at a time, which ones and their gradient."""
        height = self.parts[0].shape[1] if self.whole is None else self.whole.shape[0]
        for start in range(0, height, HEAD_ROWS):
            rows = slice(start, min(start + HEAD_ROWS, height))
            if self.whole is not None:
                yield rows, self.whole[rows]
                continue
            first, *more = (logits[:, rows].t() @ source for logits, source in zip(self.parts[::2], self.parts[1::2], strict=True))
            yield rows, sum(more, first.float()) if more else first

    def write(self, buffer: torch.Tensor) -> None:
        """Put it into `buffer` (V, H)."""
        if self.whole is None and len(self.parts) == 2:
            torch.mm(self.parts[0].t(), self.parts[1], out=buffer)
            return
        for rows, gradient in self.pieces():
            buffer[rows] = gradient


class WeightKeeper(Protocol):
    """Who keeps the weight of a head that is trained, where that is not autograd: `keeper` of the head's layer."""

    kind: torch.dtype

    def rounded(self) -> torch.Tensor:
        """The weight in `kind`."""

    def take_gradient(self, gradient: HeadGradient, scale: float) -> None:
        """Add `scale` times a gradient to the weight's."""


ROWS = "new_tokens"
"""The submodule of a frozen head, or of a frozen embedding, that has its learned rows (`worker/modeling/new_tokens.py:LearnedRows`)."""


class NewRows(NamedTuple):
    """Rows of a frozen head that learn: `rows` (n, H), whose values the head has from row `first` on."""

    first: int
    rows: torch.Tensor

    @property
    def place(self) -> slice:
        return slice(self.first, self.first + len(self.rows))


class Head(NamedTuple):
    """The language-model head and its logit transform: `cap` · tanh(logits · `scale` / `cap`)."""

    weight: torch.Tensor  # (V, H)
    bias: torch.Tensor | None
    scale: float = 1.0
    cap: float | None = None
    keeper: WeightKeeper | None = None
    new: NewRows | None = None

    def weight_in(self, kind: torch.dtype) -> torch.Tensor:
        """The weight in the type of the products."""
        return self.keeper.rounded() if self.keeper is not None and self.keeper.kind == kind else self.weight.to(kind)

    def whole(self) -> torch.Tensor:
        """The weight, with a gradient for its learned rows."""
        if self.new is None:
            return self.weight
        place = self.new.place
        return torch.cat([self.weight[: place.start], self.new.rows.to(self.weight.dtype), self.weight[place.stop :]])


def head_of(model: torch.nn.Module) -> Head:
    """The head of a transformers language model."""
    whole = transformer(model)
    layer, config = cast("torch.nn.Linear", whole.get_output_embeddings()), whole.config
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    divisor = float(getattr(config, "logits_scaling", None) or 1.0)
    if getattr(config, "scale_decoder_outputs", False):  # T5, where embedding and head are one
        scale *= config.d_model**-0.5
    cap = getattr(config, "final_logit_softcapping", None)
    learned = getattr(layer, ROWS, None)
    new = None if learned is None else NewRows(learned.first, learned.rows)
    bias = getattr(layer, "bias", None)
    fixed = getattr(whole, "final_logits_bias", None)  # of BART and its relatives: a buffer, zero in most
    if bias is None and fixed is not None and bool(fixed.any()):
        bias = fixed[0]
    return Head(layer.weight, bias, scale / divisor, cap, getattr(layer, "keeper", None), new)


CHUNK_BYTES_GPU = 2**30
"""The chunk size on a GPU, whose products need thousands of rows: 2,048 rows of 128,256 logits in float32."""


def chunk_rows(vocabulary: int, rows: int, gpu: bool = False, width: int = 8) -> int:
    """Positions per chunk; `width` bytes are alive for each logit, at least 4 on a GPU."""
    return max(16, min(rows, CHUNK_BYTES_GPU // (max(width, 4) * vocabulary) if gpu else CHUNK_BYTES // (width * vocabulary)))


def _blocks(logits: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Blocks of a chunk's rows in float32: (slice, a copy, or a view where the chunk is float32)."""
    rows = logits.shape[0] if devices.is_gpu(logits.device) else max(1, BLOCK_BYTES // (4 * logits.shape[1]))
    room = torch.empty(min(rows, logits.shape[0]), logits.shape[1], device=logits.device) if logits.dtype != torch.float32 else None
    for start in range(0, logits.shape[0], rows):
        part = logits[start : start + rows]
        yield slice(start, start + part.shape[0]), part if room is None else room[: part.shape[0]].copy_(part)


def _finish(logits: torch.Tensor, head: Head) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Apply scale, bias and cap to float32 products, in place where there is no cap: (logits, tanh of the capped ones, which the
    gradient needs, or None)."""
    if head.bias is not None:
        logits += head.bias.float()
    if head.scale != 1.0:
        logits *= head.scale
    if head.cap is None:
        return logits, None
    bent = torch.tanh_(logits.div_(head.cap))
    return bent * head.cap, bent


def _softmax_(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(nats of each target (rows, 1), probabilities (rows, V)); overwrites the logits."""
    picked = logits.gather(1, targets[:, None])
    top = logits.amax(1, keepdim=True)
    p = logits.sub_(top).exp_()
    mass = p.sum(1, keepdim=True)
    return mass.log() + top - picked, p.mul_(mass.reciprocal())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        new_rows: torch.Tensor | None,
        targets: torch.Tensor,
        rest: Any,
    ) -> Any:
        """`rest` is the remainder of the head, and the dtype of the products; `new_rows` are the rows of its `new`, for autograd to see."""
        head, compute = Head(weight, bias, *rest[0]), rest[1]
        plain = head.bias is None and head.scale == 1.0 and head.cap is None
        gpu = devices.is_gpu(hidden.device)
        if gpu and plain and compute != torch.float32 and kernel_works(hidden.device):
            return _on_gpu(ctx, hidden, weight, new_rows, targets, compute, head.new)
        # On a GPU this check would synchronize, so the mask is always applied there.
        kept = (targets >= 0)[:, None] if gpu or bool((targets < 0).any()) else None
        wanted, targets = targets, targets if kept is None else targets.clamp(min=0)
        single = head.bias is None and head.cap is None and head.scale > 0  # what the CPU kernel supports
        needs_hidden, needs_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        rows = chunk_rows(weight.shape[0], hidden.shape[0], gpu, compute.itemsize)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        # The head's gradient is as large as the head; where the logits' gradients are smaller, they are kept and multiplied
        # later.
        keeps = needs_weight and hidden.shape[0] * compute.itemsize <= 4 * hidden.shape[1]
        parts: list[torch.Tensor] = []
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight and not keeps else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and ctx.needs_input_grad[2] else None
        d_rows = torch.zeros_like(new_rows) if new_rows is not None and ctx.needs_input_grad[3] else None
        cast = head.weight_in(compute)
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            logits = F.linear(hidden[part].to(compute), cast)
            in_one = single and jit.supports(logits)
            if in_one:
                losses = torch.empty(logits.shape[0])
                softmax_loss_(logits, wanted[part], losses, head.scale, d_hidden is not None or needs_weight or d_rows is not None)
                total += losses.sum()
            for block, products in () if in_one else _blocks(logits):
                own = slice(start + block.start, start + block.stop)
                finished, bent = _finish(products, head)
                nats, p = _softmax_(finished, targets[own])
                real = kept[own] if kept is not None else None
                if real is not None and not gpu and bool(real.all()):
                    real = None
                total += (nats * real).sum() if real is not None else nats.sum()
                if d_hidden is None and not needs_weight and d_rows is None:
                    continue
                p.scatter_add_(1, targets[own, None], torch.full_like(nats, -1.0))  # d loss / d logits
                if real is not None:
                    p.mul_(real)
                if bent is not None:
                    p.mul_(1 - bent.square())
                if head.scale != 1.0:
                    p.mul_(head.scale)
                if d_bias is not None:
                    d_bias += p.sum(0)
                if p.data_ptr() != logits[block].data_ptr():
                    logits[block] = p
            if d_hidden is not None:
                d_hidden[part] = logits @ cast
            if d_rows is not None and head.new is not None:
                d_rows += logits[:, head.new.place].t() @ hidden[part].to(compute)
            if keeps:
                parts += [logits, hidden[part].to(compute)]
            elif d_weight is not None:
                if compute == torch.float32:
                    d_weight.addmm_(logits.t(), hidden[part].float())
                else:
                    d_weight += logits.t() @ hidden[part].to(compute)
        ctx.save_for_backward(d_hidden, d_weight, d_bias, d_rows, *parts)
        ctx.keeper = head.keeper
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        d_hidden, d_weight, d_bias, d_rows, *parts = ctx.saved_tensors
        if ctx.keeper is not None:
            ctx.keeper.take_gradient(HeadGradient(d_weight, parts), float(grad))
            d_weight = None
        elif parts:
            d_weight = torch.cat([product for _, product in HeadGradient(None, parts).pieces()]).float()
        scaled = (None if g is None else g.mul_(grad.to(g.dtype)) for g in (d_hidden, d_weight, d_bias, d_rows))
        return *scaled, None, None


def _on_gpu(
    ctx: Any,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    new_rows: torch.Tensor | None,
    targets: torch.Tensor,
    compute: torch.dtype,
    new: NewRows | None,
) -> torch.Tensor:
    """The loss with logits in `compute`, overwritten with their gradient by one kernel. Targets below 0 are ignored."""
    from worker.kernels.gpu.cross_entropy import softmax_gradient_

    needs_hidden, needs_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
    source, cast = hidden.to(compute), weight.to(compute)
    rows = max(256, chunk_rows(weight.shape[0], hidden.shape[0], True, 4) // 256 * 256)
    losses = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    d_hidden = torch.empty_like(source) if needs_hidden else None
    d_weight: torch.Tensor | None = None
    d_rows = torch.zeros_like(new_rows) if new_rows is not None and ctx.needs_input_grad[3] else None
    for start in range(0, hidden.shape[0], rows):
        part = slice(start, start + rows)
        logits = source[part] @ cast.t()
        softmax_gradient_(logits, targets[part], losses[part])
        if d_hidden is not None:
            torch.mm(logits, cast, out=d_hidden[part])
        if needs_weight:
            more = torch.mm(logits.t(), source[part], out_dtype=torch.float32)
            d_weight = more if d_weight is None else d_weight.add_(more)
        if d_rows is not None and new is not None:
            d_rows += torch.mm(logits[:, new.place].t(), source[part], out_dtype=torch.float32)
        del logits
    ctx.save_for_backward(d_hidden if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, None, d_rows)
    ctx.keeper = None
    return losses.sum()


def pad_to_multiple(
    hidden: torch.Tensor, targets: torch.Tensor, compute: torch.dtype, value: int = -100
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states (K, H) and targets (K,) padded to a multiple of `packed_attention.MULTIPLE` rows, with zero states and the
    target `value`, for a bf16 product on a CPU. Others are returned unchanged."""
    spare = -hidden.shape[0] % MULTIPLE if hidden.device.type == "cpu" and compute.itemsize < 4 else 0
    return (F.pad(hidden, (0, 0, 0, spare)), F.pad(targets, (0, spare), value=value)) if spare else (hidden, targets)


def linear_cross_entropy(hidden: torch.Tensor, head: Head, targets: torch.Tensor, compute: torch.dtype = torch.float32) -> torch.Tensor:
    """Sum of the cross-entropy, in nats, of `hidden` (K, H) against `targets` (K,), which are ignored below 0: a float32 scalar.
    Products run in the dtype `compute`, sums in float32. Differentiable in `hidden` and, where they are trained, the head's
    weight, its bias and its learned rows."""
    if hidden.shape[0] == 0:
        return hidden.sum() * 0.0
    if not kernels.allowed():
        return plain_nats(hidden, head, targets, compute).sum()
    with torch.autocast(hidden.device.type, enabled=False):
        hidden, targets = pad_to_multiple(hidden, targets, compute)
        rows = None if head.new is None else head.new.rows
        return _LinearCrossEntropy.apply(hidden, head.weight, head.bias, rows, targets, (head[2:], compute))


def plain_nats(hidden: torch.Tensor, head: Head, targets: torch.Tensor, compute: torch.dtype = torch.float32) -> torch.Tensor:
    """The cross-entropy in nats of each of `hidden` (K, H) against `targets` (K,), 0 where that is -100: what the losses of this
    package have to equal, as one would write it. The logits of a chunk are recomputed in the backward pass, so that they fit."""

    weight = head.whole()

    def chunk(states: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        logits = F.linear(states.to(compute), weight.to(compute)).to(torch.promote_types(compute, torch.float32))
        logits = logits if head.bias is None else logits + head.bias.to(logits.dtype)
        logits = logits * head.scale
        logits = logits if head.cap is None else head.cap * torch.tanh(logits / head.cap)
        return F.cross_entropy(logits, wanted, reduction="none")

    rows = chunk_rows(head.weight.shape[0], hidden.shape[0], devices.is_gpu(hidden.device))
    pairs = zip(hidden.split(rows), targets.split(rows), strict=True)
    with torch.autocast(hidden.device.type, enabled=False):
        return torch.cat([checkpoint(chunk, *pair, use_reentrant=False, preserve_rng_state=False) for pair in pairs])


@torch.no_grad()
def score(
    hidden: torch.Tensor, head: Head, targets: torch.Tensor, compute: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy in nats (K,), and whether the likeliest token is the target (K,), without gradients."""
    count = hidden.shape[0]
    hidden, targets = pad_to_multiple(hidden, targets, compute)
    losses = torch.empty(hidden.shape[0], device=hidden.device)
    hits = torch.empty(hidden.shape[0], dtype=torch.bool, device=hidden.device)
    rows = chunk_rows(head.weight.shape[0], max(hidden.shape[0], 1), devices.is_gpu(hidden.device), compute.itemsize)
    cast = head.weight_in(compute)
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, hidden.shape[0], rows):
            for block, products in _blocks(F.linear(hidden[start : start + rows].to(compute), cast)):
                own = slice(start + block.start, start + block.stop)
                finished, _ = _finish(products, head)
                hits[own] = finished.argmax(1) == targets[own]
                losses[own] = _softmax_(finished, targets[own].clamp(min=0))[0][:, 0]
    return losses[:count], hits[:count]
