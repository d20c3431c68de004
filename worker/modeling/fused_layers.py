"""Faster forms of layers that transformers composes of single operations. Same formulas, weights and names."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, cast

import torch
import torch.nn.functional as F

from app.strategies._model import transformer
from worker import kernels
from worker.kernels.cpu.gated_mlp import patch_gated_mlp
from worker.kernels.cpu.rms_norm import rms_norm
from worker.kernels.cpu.rotary import patch_rotary
from worker.kernels.gpu import fp8
from worker.modeling import packed_attention
from worker.runtime.device import Compute

PLAIN_NORMS = frozenset(
    f"{family}RMSNorm" for family in ("Llama", "Mistral", "Mixtral", "Qwen2", "Qwen3", "Qwen3Moe", "SmolLM3", "Granite", "Phi3")
)
"""Norms whose formula is weight · x / sqrt(mean(x²) + eps). Gemma's, which adds 1 to the weight, is not among them."""


def patch_layers(model: torch.nn.Module, device: torch.device, *, rotary: bool = True, grouped: bool = True) -> int:
    """Replace the layers of a model for which there is a faster form, as it trains and as it is evaluated: norms, on a CPU gated
    activations and rotary embeddings, and the layers of an adapter, once a strategy has attached it. Returns how many of an adapter
    there are. Called again it changes what has come since; with `LUTHIER_KERNELS=plain` nothing.

    `grouped` lets layers that read the same input share a product.
    """
    if not kernels.allowed():
        return 0
    patch_norms_and_mlp(model)
    if rotary:
        patch_rotary(model, device)
    if not hasattr(model, "peft_config"):
        return 0
    from worker.modeling import fused_ia3, fused_lora, fused_vera, graph_breaks  # peft takes a while to import

    graph_breaks.skip_module_dropout(model)
    return fused_lora.fuse(model, grouped) or fused_vera.fuse(model, grouped) or fused_ia3.fuse(model)


def patch_norms_and_mlp(model: torch.nn.Module) -> None:
    """Norms and gated activations in as few passes as they need, where a model has such."""
    patch_norms(model)
    if next(model.parameters()).device.type == "cpu":
        patch_gated_mlp(model)


def patch_norms(model: torch.nn.Module) -> int:
    """Compute RMS norms in one kernel instead of six. Returns the number of layers changed.

    Measured in float32 on a CPU, LoRA on a 135 M model: no difference (137 and 137 tokens per CPU second). It is kept for bf16
    autocast, where a prototype of 14 M gained a quarter, and for GPUs, where it saves kernel launches.
    """
    found = [m for m in model.modules() if type(m).__name__ in PLAIN_NORMS and not hasattr(type(m), "plain")]
    before_products = {id(norm) for block in blocks_of(model) for norm in block.children()}
    for norm in found:
        norm.__class__ = _fused_norm(type(norm), id(norm) in before_products)  # type: ignore[arg-type]  # a class is hashable
    return len(found)


@functools.cache
def _fused_norm(kind: type, before_products: bool) -> type:
    """A subclass of a norm with another forward: a deep copy of the model keeps it, and torch.compile sees one class for all
    layers.

    An output that only linear layers read is rounded once to the dtype of their products; autocast would round it for each of
    them. On a GPU autocast would also compute every norm in float32 and return float32, Qwen3's query and key norms included; the
    kernel sums in float32 whatever its input, so it is called outside of autocast.
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
"""Compiling one block takes 30 to 60 seconds on an H100 and gains a sixth to a quarter, so it does not pay for a shorter job."""

_compiled = False


SQUEEZED = 0.9
"""Share of a block's activations that the compiler may keep where memory is short. It then computes again what costs no product: of a
gated feed-forward the activation, and normalized inputs; a third of the bytes for 2 % of the time (estimated for a 1 B model on an
H100). Below about 0.65 it would compute products again too, which recomputing whole layers does without their memory."""


def compile_blocks(model: torch.nn.Module, backend: Any = "inductor", squeezed: bool = False) -> int:
    """Compile the decoder's blocks one by one with a backend of torch.compile: they share one graph (two where the lowest block's
    input needs no gradient), and the head and the rotary tables are not compiled. `squeezed` blocks keep less for the backward pass."""
    global _compiled
    import torch._dynamo.utils
    import torch._functorch.config

    torch._functorch.config.activation_memory_budget = SQUEEZED if squeezed else 1.0

    torch._dynamo.config.suppress_errors = True  # what cannot be compiled runs as it is
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    found = blocks_of(model)
    for block in found:
        block.compile(dynamic=False, backend=backend)
    _compiled = bool(found)
    return len(found)


def uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Within this context nothing is compiled: evaluations have many shapes, and each would cost a compilation."""
    return torch.compiler.set_stance("force_eager") if _compiled else contextlib.nullcontext()


def given_up() -> int:
    """Number of graphs that the compiler gave up on; they run uncompiled, only slower."""
    if not _compiled:
        return 0
    frames = torch._dynamo.utils.counters["frames"]
    return frames["total"] - frames["ok"]


# All together ---------------------------------------------------------------------------------------------------------


def compiles(model: torch.nn.Module, engine: Compute, seconds: float) -> bool:
    """Whether `speed_up` compiles the blocks of this model in a job of so many seconds."""
    return engine.framed and seconds >= MIN_SECONDS_TO_COMPILE and kernels.allowed() and not _has_graph_breaks(model)


def speed_up(model: torch.nn.Module, engine: Compute, seconds: float, squeezed: bool = False) -> dict[str, Any]:
    """Apply all speed-ups that this device supports to a model with its strategy attached; `seconds` is the expected duration of
    the job, and `squeezed` asks compiled blocks to keep less. Returns what was applied, for the record."""
    done: dict[str, Any] = {}
    if engine.fp8:
        done["fp8_layers"] = fp8.patch_fp8(blocks_of(model))
    if engine.framed:
        packed_attention.probe_grouped_heads(engine.device)
    compiled = compiles(model, engine, seconds)
    recomputes = any(getattr(block, "gradient_checkpointing", False) for block in blocks_of(model))
    # What one layer keeps for its neighbours is a side effect that the compiler takes for none of a recomputed block.
    adapted = patch_layers(model, engine.device, grouped=not (compiled and recomputes))
    if hasattr(model, "peft_config"):
        done["fused_lora"] = adapted
    if compiled:
        done["compiled_blocks"] = compile_blocks(model, squeezed=squeezed)
        done["activations_squeezed"] = squeezed
    return done


def _has_graph_breaks(model: torch.nn.Module) -> bool:
    """Whether an adapter's layers would be compiled in pieces."""
    if not hasattr(model, "peft_config"):
        return False
    from worker.modeling import graph_breaks

    return graph_breaks.has_graph_breaks(model)


def round_embeddings(model: torch.nn.Module, compute: torch.dtype) -> bool:
    """Make a decoder's residual stream be in `compute` even where the embedding is kept in float32 because it is trained: what a
    block adds has that dtype anyway. Returns whether a cast was needed. The strategy is attached already."""
    table = cast("torch.nn.Embedding", transformer(model).get_input_embeddings())
    if table.weight.dtype == compute:
        return False
    table.register_forward_hook(lambda _, given, out: out.to(compute))
    return True


def recompute_layers(model: torch.nn.Module, count: int, reaches: int | None = None) -> int:
    """Activation checkpointing: `count` blocks recompute their activations in the backward pass, the lowest of the `reaches` top
    blocks that gradients pass through (None: all). Returns how many do. The model is a transformers model with its strategy
    attached.

    (Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost, https://arxiv.org/abs/1604.06174.)
    """
    blocks = blocks_of(model)
    reached = blocks[max(0, len(blocks) - reaches) :] if reaches is not None else blocks
    chosen = reached[: max(count, 0)]
    if not chosen:
        return 0
    transformer(model).gradient_checkpointing_enable({"use_reentrant": False})
    # Otherwise the embedding's output would require a gradient, which only reentrant checkpointing needs: below the lowest
    # trainable layer it would be computed and kept for nothing.
    transformer(model).disable_input_require_grads()
    for block in blocks:
        block.gradient_checkpointing = any(block is one for one in chosen)  # type: ignore[assignment]  # a flag of transformers' blocks
    return len(chosen)
