"""Estimates the peak memory of a job and which layers have to be recomputed. Pure, no torch.

`tests/worker/training/test_memory.py` compares it with autograd's own count, `benchmarks/estimates.py` with whole jobs.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel

from app.machines.hardware import Machine
from app.objectives import OBJECTIVES
from app.optimizers import OPTIMIZERS
from app.planning.rehearsal import ROW_TOKENS
from app.run_settings import RunSettings
from app.shapes import Shape
from app.strategies import Strategy
from app.strategies._base import Memory
from app.strategies._peft import PeftStrategy

FLOOR_CPU_BYTES = 656 * 2**20
"""A trainer with its libraries loaded and no model: measured with torch 2.13, transformers 5.23 and Numba 0.68, which takes 100
MiB of it."""
PEFT_CPU_BYTES = 24 * 2**20
"""The library peft, for strategies that use it: measured as what these needed more than others on an encoder of 22 M."""
PART_BYTES = 128 * 2**20
"""Additional memory of each of several threads that compute parts of a pack, in float32: fragmentation of its allocator arena,
and packed copies of matrices in its products. Measured on the decoder of 135 M, two parts: 70 to 320 MB, with DoRA 310 to 540; a
small model's matrices are small."""
PART_OF_WHOLE_BYTES = 64 * 2**20
"""The same in bf16 with full fine-tuning: 105 to 295 MB for two on that decoder, more with short rows than with long ones."""
UNPLACED = 0.85
"""Share of the gradients that does not fit into the memory freed by activations, which is fragmented differently."""
FLOOR_CUDA_BYTES = 700 * 2**20
"""The CUDA context, the libraries' workspaces and the allocator's rounding."""
HOLES = 0.15
"""Fragmentation of kept bf16 activations on a CPU, as a share of their size: temporary float32 tensors between them leave holes.
Measured on LoRA over a 135 M model at 192, 512 and 1,024 tokens; without bf16 there was none."""
HOLES_IN_PARTS = 0.1
"""The same where each part of a pack has an arena of its own: LoRA took 1,353 to 1,389 MB at 256 tokens, 1,360 to 1,452 at 512
and 1,909 to 2,046 at 1,024."""
LOGITS_BYTES = 96 * 2**20
LOGITS_CUDA_BYTES = 2**30
"""Chunks of float32 logits in `worker/modeling/cross_entropy.py`."""

EMBEDDED_TOKENS = 4096
"""Tokens of a batch in `worker/training/feature_cache.py`."""


PART_LEFT_BYTES = 24 * 2**20
"""What such a thread's arena keeps after everything is freed."""
MIN_PART_TOKENS, PART_TOKENS = 128, 512
"""Minimum tokens of each of two parts of a pack that a CPU computes in parallel (`worker/runtime/thread_parallel.py`), and of
each of more than two. LoRA on two cores gained 1.3 times with parts of 64 and of 128 tokens, 1.5 to 1.6 with parts of 256 and of
512. A pass has a fixed cost (0.22 s of a core on the starter with 8 tokens), and between its operations it runs in Python, where
the GIL admits one thread at a time."""


class MemoryParts(BaseModel):
    weights: int
    gradients: int
    optimizer: int
    activations: int
    other: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.other


def passes(run: RunSettings, processes: int) -> int:
    """Passes of a step: as configured, rounded up to a multiple of the number of processes."""
    return -(-run.passes // processes) * processes


def parts_of(tokens: int, threads: int) -> int:
    """Parts of a pack that a CPU computes in parallel; they share the threads."""
    return max(1, min(threads, max(tokens // PART_TOKENS, min(2, tokens // MIN_PART_TOKENS))))


def parts_beside(shape: Shape, strategy: Strategy, run: RunSettings, tokens: int, machine: Machine) -> int:
    """Expected number of parts of a job's packs of `tokens` (`worker/training/step.py:parts_of` decides): one where dropout draws
    random numbers, as in most encoders."""
    draws = shape.architecture == "encoder" or bool(getattr(strategy, "dropout", 0.0)) or bool(run.neftune_noise_alpha)
    shared_out = machine.processes > 1 and not strategy.adapter
    return 1 if machine.cuda or draws or shared_out else parts_of(tokens, machine.cores // machine.processes)


def pack_tokens(run: RunSettings, longest: int, processes: int = 1, virtual_tokens: int = 0) -> int:
    """Tokens of one pass: a step's share, or the longest row where that is more; for a batch size in rows, that many of the longest. A
    pack is filled up with whole general rows, the last of which may reach beyond it."""
    general = ROW_TOKENS + virtual_tokens if run.rehearsal_fraction else 0
    if run.max_tokens_per_step is None:
        own = longest * math.ceil((run.batch_size or 1) * run.gradient_accumulation_steps / passes(run, processes))
        return math.ceil(own / (1 - run.rehearsal_fraction)) + general
    return max(math.ceil(run.max_tokens_per_step * run.gradient_accumulation_steps / passes(run, processes)) + general, longest)


AMPERE = 8.0
"""The first compute capability with bf16; GPUs before it take fp16."""


def precision_of(run: RunSettings, strategy: Strategy, machine: Machine) -> Literal["fp32", "bf16", "fp16"]:
    """The dtype a job runs in: as configured, or bf16 where the machine gains by it, or fp16 on a GPU that has no bf16."""
    if run.precision != "auto":
        return run.precision
    if machine.cuda and (machine.gpu_capability or AMPERE) < AMPERE:
        return "fp16" if strategy.adapter or machine.processes == 1 else "fp32"
    return "bf16" if machine.cuda or (machine.bf16_pays and strategy.trains_in_bf16()) else "fp32"


def uses_full_tuning(strategy: Strategy, machine: Machine) -> bool:
    """Whether a job's layers are those of `worker/kernels/cpu/full_tuning.py`, which hold rounded weights and gradients permanently."""
    return not machine.cuda and machine.processes == 1 and not strategy.adapter


def pads(shape: Shape, run: RunSettings) -> bool:
    """Whether rows are padded to the longest of their pass, so that a pack counts what padding takes too."""
    return not run.packing or shape.pads


def new_token_parameters(shape: Shape, run: RunSettings) -> int:
    """Rows of new tokens, in the embedding and in a head of its own."""
    return len(run.new_tokens or ()) * shape.hidden * (1 if shape.tied else 2)


def reached_layers(shape: Shape, strategy: Strategy, run: RunSettings) -> int:
    """Layers that gradients pass through: all of them where rows of the embedding learn."""
    return shape.layers if run.new_tokens else strategy.reaches(shape)


def layer_bytes(
    shape: Shape,
    strategy: Strategy,
    half: bool,
    cuda: bool,
    whole: bool = False,
    units: bool = False,
    fp16: bool = False,
    squeezed: bool = False,
    longest: int = 0,
) -> tuple[int, int]:
    """What one layer keeps for the backward pass: (bytes per token, fixed bytes).

    With any gradient passing through, these are the inputs of the norms, the queries, keys, values and outputs of attention, and
    in a gated feed-forward the gate, the up projection and on a GPU the activation. (The `whole` layers of
    `worker/kernels/cpu/full_tuning.py` recompute their product.) On a CPU attention is float32 even in bf16, except with AMX
    (`units`, `worker/kernels/cpu/attention.py`). In fp16 the residual stream is float32, and without the attention over packs, which is
    bf16's, keys and values are kept once per head of the queries. `squeezed`: the compiler computes the activation again from gate and
    up projection (`worker/modeling/fused_layers.py:compile_blocks`). Trainable weights add their own inputs. Counted tensor by tensor;
    `tests/worker/training/test_memory.py` compares it with autograd's own count. Of a model that was measured when it was added, what passes
    through is what was measured, with the pairs of rows as long as the `longest`.
    """
    compute = 2 if half else 4
    island = compute if cuda else 4
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norms = shape.norms_per_layer * shape.hidden + (q + kv if shape.qk_norm else 0)
    read = 4 if fp16 else compute if strategy.adapter else island  # the residual stream has the dtype of the frozen weights
    own = strategy.activation_counts(shape)
    in_tiles = half and units and not cuda and shape.head_dim % 32 == 0
    # The same tensor as the next layer's input, which is counted where that is trained.
    attended = (q if in_tiles and own.per_token >= shape.layer_inputs() else 2 * q) + 2 * (q if cuda and (fp16 or not half) else kv)
    wide = (3 if cuda and not squeezed else 2) if shape.gated else 1
    passing = norms * read + attended * (compute if in_tiles else island) + wide * shape.intermediate * compute
    passing += 4 * shape.heads if cuda or in_tiles else 0  # log-sum-exp of each row of scores
    if (step := shape.step) is not None:
        # Under autocast a CPU keeps about half of it in float32.
        width = 1.0 if not half else 0.5 if cuda else 0.75
        passing = math.ceil((step.bytes_per_token + step.bytes_per_pair * longest) / shape.layers * width)
    per_token = passing + own.per_token * compute - (shape.intermediate * compute if whole and shape.gated else 0)
    # Float32 weights are rounded to bf16 for the products, and the copies are kept until the gradient has passed.
    rounded = 2 * sum(x.inputs * x.outputs for x in shape.linears()) if half and not strategy.adapter and not whole else 0
    return per_token, own.once * compute + rounded


def head_bytes(shape: Shape, tokens: int, half: bool, trained: bool, cuda: bool, parts: int = 1, whole: bool = False) -> int:
    """The chunks of logits alive at once in `worker/modeling/cross_entropy.py`, one for each part of a pack, plus the gradient of
    the hidden states and what each part needs of the head itself. On a GPU a chunk has as many rows as fit in float32; in half of that
    its kernel overwrites it with its gradient, and else there are two."""
    width = 2 if half and not cuda else 4
    chunks = min(tokens * shape.vocabulary * width, LOGITS_CUDA_BYTES if cuda else parts * LOGITS_BYTES)
    head = shape.vocabulary * shape.hidden
    # The head in bf16, its gradient in float32, a chunk's contribution before it is added, which on a GPU is float32 too and of which a
    # single chunk has none, and on a CPU the head as packed for bf16 products.
    added = (4 if 4 * tokens * shape.vocabulary > LOGITS_CUDA_BYTES else 0) if cuda else 2 + 2
    own = head * (4 + 2 + added if half else 4) if trained else 0
    if whole and trained:  # where they are smaller, the logits' gradients are kept instead of the head's
        own = head * ((2 if half else 0) + (4 if tokens // parts * width > 4 * shape.hidden else 0))
    logits = chunks if not cuda else chunks // 2 if half else 2 * chunks
    return logits + 8 * tokens * shape.hidden + parts * own


def attention_bytes(shape: Shape, tokens: int, longest: int) -> int:
    """Backward pass of the GPU's attention in one layer: its queries' gradient in float32, head widths rounded up to a multiple
    of 32, with 128 rows of padding for each entry of the table of sequences. (`worker/modeling/packed_attention.py:frame_of`
    makes twice the usual number of entries; rows are assumed to be a third as long as the longest on average.)"""
    places = math.ceil(2 * tokens / max(longest / 3, 1)) + 16 + math.ceil(tokens / longest)
    return 4 * (tokens + 128 * min(places, tokens)) * shape.heads * 32 * math.ceil(shape.head_dim / 32)


def spread_over(held: Memory, shape: Shape, strategy: Strategy, processes: int) -> Memory:
    """What each of several processes holds where they share the weights themselves (`worker/training/backends/fsdp.py`): its rows of the blocks,
    all of the rest, and two gathered blocks, the one at work and the next."""
    if strategy.adapter or processes == 1:
        return held
    blocks = shape.top_parameters(shape.layers)
    kept = 1 - blocks / shape.parameters() * (1 - 1 / processes)
    gathered = 2 * 4 * shape.layer_parameters()
    return Memory(int(held.weights * kept) + gathered, int(held.gradients * kept) + gathered, int(held.optimizer * kept))


def memory_of(
    shape: Shape,
    strategy: Strategy,
    run: RunSettings,
    longest: int,
    machine: Machine,
    recompute: int,
    task: str = "generation",
    squeezed: bool = False,
) -> MemoryParts:
    """Peak bytes of each process by purpose, with the activations of `recompute` layers recomputed in the backward pass; `squeezed` as in
    `layer_bytes`."""
    precision = precision_of(run, strategy, machine)
    half, fp16 = precision != "fp32", precision == "fp16"
    frozen_bytes = 2 if half and strategy.adapter else 4
    all_of = strategy.memory(shape, weight_bytes=frozen_bytes, optimizer_bytes=OPTIMIZERS[run.optimizer].bytes)
    if run.optimizer == "muon":  # what its AdamW updates: embeddings and vectors
        others = strategy.trainable(shape) - sum(x.inputs * x.outputs for x in shape.each_linear())
        all_of = all_of._replace(optimizer=all_of.optimizer + (4 * max(0, others) if not strategy.adapter else 0))
    new = new_token_parameters(shape, run)
    all_of = Memory(all_of.weights + 4 * new, all_of.gradients + 4 * new, all_of.optimizer + OPTIMIZERS[run.optimizer].bytes * new)
    loaded = all_of.weights
    if run.frozen_weights == "fp8":  # a byte each, and four for the scale of a row
        saved = sum((frozen_bytes - 1) * x.inputs * x.outputs - 4 * x.outputs for x in shape.each_linear())
        all_of = all_of._replace(weights=all_of.weights - saved)
    held = spread_over(all_of, shape, strategy, machine.processes)
    writes = not OBJECTIVES[task].heads
    unused = 0 if writes else shape.parameters() - shape.body_parameters()  # a classifier is loaded without head and pooler
    tokens, compute = pack_tokens(run, longest, machine.processes, strategy.virtual_tokens()), 2 if half else 4
    whole = uses_full_tuning(strategy, machine)
    per_token, once = layer_bytes(shape, strategy, half, machine.cuda, whole, machine.matrix_units, fp16, squeezed, longest)
    reached = reached_layers(shape, strategy, run)
    recompute = min(recompute, reached)
    everything = strategy.trainable(shape) >= shape.parameters()
    parts = parts_beside(shape, strategy, run, tokens, machine)
    layer = tokens * per_token + once  # of an adapter's fixed bytes per layer, two parts were measured to take no more than one
    kept: float = (reached - recompute) * layer + recompute * tokens * shape.hidden * (4 if fp16 else compute) + (layer if recompute else 0)
    if half and not machine.cuda:
        kept += (HOLES if parts == 1 else HOLES_IN_PARTS) * reached * tokens * per_token
    # What the widest part of a layer makes on the way, kept or not: forwards, and as gradients backwards.
    passing = tokens * (3 * shape.intermediate + 4 * shape.hidden) * compute
    passing += attention_bytes(shape, tokens, longest) if machine.cuda and precision == "bf16" else 0
    tables = strategy.tables(shape)
    head = head_bytes(shape, tokens, half, bool(everything or tables) and writes, machine.cuda, parts, whole) if writes else 0
    # Activations are freed while gradients grow, so the peak is near one end of the backward pass or the other.
    table = shape.vocabulary * shape.hidden * 4 if everything or tables else 0
    begin, end = kept + max(head, passing), held.gradients + passing + table + (parts - 1) * 4 * tables  # each part has its own
    peak = max(begin + int(UNPLACED * (held.gradients - min(table, held.gradients))), end)
    if whole:  # rounded copies and gradients stay allocated
        linears = sum(x.inputs * x.outputs for x in shape.each_linear())
        rounded = 2 * (linears + (shape.vocabulary * shape.hidden if writes else 0)) if half else 0
        peak = held.gradients + rounded + kept + max(head, passing)
    weights = held.weights - unused * frozen_bytes
    other = FLOOR_CUDA_BYTES if machine.cuda else FLOOR_CPU_BYTES + _joined_bytes(shape, strategy, frozen_bytes)
    if not machine.cuda and isinstance(strategy, PeftStrategy):
        other += PEFT_CPU_BYTES
    if parts > 1 and (whole or not half):
        other += parts * min(PART_OF_WHOLE_BYTES if half else PART_BYTES, weights // 4)
    trains = weights + held.optimizer + peak + other
    loads = 0 if machine.cuda else FLOOR_CPU_BYTES + shape.parameters() * _loading_bytes(shape, frozen_bytes)
    if new and not machine.cuda:  # a longer table is made beside the one that was loaded
        loads += shape.vocabulary * shape.hidden * frozen_bytes
    if parts > 1:  # the model before fine-tuning is loaded on top of what the parts' arenas keep
        loads += parts * min(PART_LEFT_BYTES, weights // 8)
    if run.frozen_weights == "fp8":  # loaded in the stored dtype, and quantized one by one
        loads = loaded + other
    if held is not all_of:  # the model is loaded and prepared in every process, and gathered again in rank 0 to be scored
        loads = all_of.weights + held.weights + held.optimizer + other
    return MemoryParts(
        weights=weights,
        gradients=held.gradients,
        optimizer=held.optimizer,
        activations=int(peak - min(held.gradients, peak)),
        other=other + max(0, int(loads - trains)),
    )


def _loading_bytes(shape: Shape, width: int) -> int:
    """Bytes per weight while weights are loaded into a dtype of `width` bytes: the file's pages are in memory too."""
    return width + (2 if shape.architecture == "decoder" else 4)  # the dtype most are published in


def _joined_bytes(shape: Shape, strategy: Strategy, frozen_bytes: int) -> int:
    """Where LoRA layers share a product (`worker/modeling/fused_lora.py`) their weights are copied into one matrix each; the
    memory they leave was measured not to be reused."""
    if not strategy.joins():
        return 0
    outputs = (shape.heads + 2 * shape.kv_heads) * shape.head_dim + 2 * shape.intermediate
    return shape.layers * shape.hidden * outputs * frozen_bytes if shape.gated else 0


def recomputed_layers(
    shape: Shape,
    strategy: Strategy,
    run: RunSettings,
    longest: int,
    machine: Machine,
    task: str = "generation",
    squeezed: bool = False,
) -> int:
    """Layers whose activations are recomputed: none or all as configured, or as few as make each process fit in nine tenths of
    its memory."""
    return fitted_memory(shape, strategy, run, longest, machine, task, squeezed)[0]


def fitted_memory(
    shape: Shape,
    strategy: Strategy,
    run: RunSettings,
    longest: int,
    machine: Machine,
    task: str = "generation",
    squeezed: bool = False,
) -> tuple[int, MemoryParts]:
    """The same, and the memory with so many layers recomputed."""
    tried = range(shape.layers + 1)
    if run.gradient_checkpointing != "auto":
        tried = range(shape.layers, shape.layers + 1) if run.gradient_checkpointing == "all" else range(1)
    limit = 0.9 * machine.training_memory_bytes
    for layers in tried:
        found = memory_of(shape, strategy, run, longest, machine, layers, task, squeezed)
        if found.total <= limit:
            break
    return layers, found


MAX_CAPTURED_PARAMETERS = 500_000_000
"""Of a larger model a GPU computes a pack for longer than the host takes to launch its kernels."""


def captures_passes(shape: Shape, strategy: Strategy, run: RunSettings, longest: int, machine: Machine, task: str = "generation") -> bool:
    """Whether the passes of a job on a GPU are worth being captured as CUDA graphs: one process trains a small model, and a step takes less
    than half of the memory, because captured passes have memory of their own beside that of others."""
    half = machine.model_copy(update={"gpu_memory_bytes": machine.training_memory_bytes // 2})
    run = run.model_copy(update={"gradient_checkpointing": "auto"})
    small = shape.architecture == "decoder" and shape.parameters() <= MAX_CAPTURED_PARAMETERS and machine.processes == 1
    return small and task == "generation" and recomputed_layers(shape, strategy, run, longest, half, task) == 0


def features_memory(
    shape: Shape, strategy: Strategy, run: RunSettings, tokens: int, rows: int, longest: int, machine: Machine
) -> MemoryParts:
    """Peak bytes with `tokens` to read and `rows` to train on: the frozen backbone, and either a batch passing through a layer or
    the embeddings while a classifier is trained on them."""
    half = precision_of(run, strategy, machine) != "fp32"
    width, compute = (2, 2) if half else (4, 4)
    tokens = max(min(EMBEDDED_TOKENS, tokens), longest)
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    passing = tokens * ((3 if shape.gated else 2) * shape.intermediate + 4 * shape.hidden + 2 * q + 2 * kv) * compute
    vectors = 3 * 4 * rows * shape.hidden
    # The pages of a small encoder's file were measured to be released before the peak.
    paged = not machine.cuda and shape.architecture == "decoder"
    loads = (_loading_bytes(shape, width) - width) * shape.body_parameters() if paged else 0
    return MemoryParts(
        weights=width * shape.body_parameters(),
        gradients=0,
        optimizer=0,
        activations=max(passing, vectors, loads),
        other=FLOOR_CUDA_BYTES if machine.cuda else FLOOR_CPU_BYTES,
    )
