"""Faster forms of layers that transformers writes out step by step. Same formula, same weights, same names."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, cast

import torch
import torch.nn.functional as F

from app.strategies._model import transformer
from worker.kernels.cpu.gated_mlp import patch_gated_mlp
from worker.kernels.cpu.rms_norm import rms_norm
from worker.kernels.gpu import fp8
from worker.runtime.device import Compute

PLAIN_NORMS = frozenset(
    f"{family}RMSNorm" for family in ("Llama", "Mistral", "Mixtral", "Qwen2", "Qwen3", "Qwen3Moe", "SmolLM3", "Granite", "Phi3")
)
"""Norms whose formula is weight · x / sqrt(mean(x²) + eps). Gemma's, which adds 1 to the weight, is not among them."""


def use_fused_layers(model: torch.nn.Module) -> None:
    """Norms and gated activations in as few passes as they need, where a model has such: as it trains and as it is judged."""
    use_fused_norms(model)
    if next(model.parameters()).device.type == "cpu":
        patch_gated_mlp(model)


def use_fused_norms(model: torch.nn.Module) -> int:
    """Compute root-mean-square norms in one kernel instead of six. Returns how many were switched.

    Measured per processor second in float32, LoRA on a 135 M model: no difference (137 and 137 tokens). It is kept for bf16
    autocast, where a prototype of 14 M gained a quarter, and for GPUs, where it saves kernels.
    """
    found = [m for m in model.modules() if type(m).__name__ in PLAIN_NORMS and not hasattr(type(m), "plain")]
    before_products = {id(norm) for block in blocks_of(model) for norm in block.children()}
    for norm in found:
        norm.__class__ = _fused_norm(type(norm), id(norm) in before_products)  # type: ignore[arg-type]  # a class is hashable
    return len(found)


@functools.cache
def _fused_norm(kind: type, before_products: bool) -> type:
    """The class of a norm with another forward: a copy of the model keeps it, and a compiler sees one class for all layers.

    What linear layers alone read is rounded once to the type of their products; autocast would round it for each of them anew.
    On a GPU autocast would besides compute every norm in float32 and hand float32 on, Qwen3's queries and keys among them;
    the kernel sums in float32 whatever it reads, so it is called outside.
    """

    def forward(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        kind = hidden.device.type
        narrow = before_products and torch.is_autocast_enabled(kind)
        wanted = torch.get_autocast_dtype(kind) if narrow else hidden.dtype
        if kind == "cpu":
            return rms_norm(hidden, self.weight, self.variance_epsilon, wanted)
        with torch.autocast(kind, enabled=False):
            return F.rms_norm(hidden, (hidden.shape[-1],), self.weight.to(hidden.dtype), self.variance_epsilon).to(wanted)

    return type(kind.__name__, (kind,), {"forward": forward, "plain": kind})


def blocks_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The decoder's blocks, in order."""
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) and hasattr(m[0], "gradient_checkpointing")]
    longest = max(lists, key=len, default=None)
    return list(longest) if longest is not None else []


# Compiling ------------------------------------------------------------------------------------------------------------

MIN_SECONDS_TO_COMPILE = 120.0
"""Compiling one block takes 30 to 60 seconds on an H100 and gains a sixth to a quarter, so a shorter job loses by it."""

_compiled = False


def compile_blocks(model: torch.nn.Module, backend: Any = "inductor") -> int:
    """Compile the decoder's blocks one by one with a backend of torch.compile: they share one graph (two where the lowest block's
    input needs no gradient), and the head and the attention's table stay outside."""
    global _compiled
    import torch._dynamo.utils

    torch._dynamo.config.suppress_errors = True  # what cannot be compiled runs as it is
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    found = blocks_of(model)
    for block in found:
        block.compile(dynamic=False, backend=backend)
    _compiled = bool(found)
    return len(found)


def uncompiled() -> contextlib.AbstractContextManager[Any]:
    """While inside, nothing is compiled: evaluations meet many shapes, and each would cost a compilation."""
    return torch.compiler.set_stance("force_eager") if _compiled else contextlib.nullcontext()


def given_up() -> int:
    """How many pieces of code the compiler gave up on; they run as they are, only slower."""
    if not _compiled:
        return 0
    frames = torch._dynamo.utils.counters["frames"]
    return frames["total"] - frames["ok"]


# All together ---------------------------------------------------------------------------------------------------------


def speed_up(model: torch.nn.Module, engine: Compute, seconds: float) -> dict[str, Any]:
    """Make a model whose strategy is attached as fast as it gets here; `seconds` is how long the job is expected to run.

    Returns what was done, for the record.
    """
    done: dict[str, Any] = {}
    if engine.fp8:
        done["fp8_layers"] = fp8.use_fp8(blocks_of(model))
    compiles = engine.framed and seconds >= MIN_SECONDS_TO_COMPILE
    recomputes = any(getattr(block, "gradient_checkpointing", False) for block in blocks_of(model))
    if hasattr(model, "peft_config"):
        from worker.modeling import fused_ia3, fused_lora, fused_vera, unbroken

        unbroken.never_drop_layers(model)
        compiles = compiles and not unbroken.breaks_graphs(model)
        # What one layer keeps for its neighbours is a side effect that the compiler takes for none of a recomputed block.
        grouped = not (compiles and recomputes)
        done["fused_lora"] = fused_lora.fuse(model, grouped) or fused_vera.fuse(model, grouped) or fused_ia3.fuse(model)
    if compiles:
        done["compiled_blocks"] = compile_blocks(model)
    return done


def round_embeddings(model: torch.nn.Module, compute: torch.dtype) -> bool:
    """Have what a decoder's blocks pass on to each other be `compute`, also where the embedding is kept in float32 because it
    learns: what a block adds is of that type in any case. Returns whether that was needed. The strategy is attached already."""
    table = cast("torch.nn.Embedding", transformer(model).get_input_embeddings())
    if table.weight.dtype == compute:
        return False
    table.register_forward_hook(lambda _, given, out: out.to(compute))
    return True


def recompute_layers(model: torch.nn.Module, count: int, reaches: int | None = None) -> int:
    """Have `count` blocks recompute their activations in the backward pass: the lowest of those, `reaches` from the top, that
    gradients pass through (None: all). Returns how many do. The model is a transformers model whose strategy is attached."""
    blocks = blocks_of(model)
    reached = blocks[max(0, len(blocks) - reaches) :] if reaches is not None else blocks
    chosen = reached[: max(count, 0)]
    if not chosen:
        return 0
    transformer(model).gradient_checkpointing_enable({"use_reentrant": False})
    # That has the embedding's output ask for a gradient, which only the reentrant form needs: it would be computed and kept for
    # nothing below the lowest layer that learns.
    transformer(model).disable_input_require_grads()
    for block in blocks:
        block.gradient_checkpointing = any(block is one for one in chosen)  # type: ignore[assignment]  # a flag of transformers' blocks
    return len(chosen)
