"""Memory and time of a job before it starts: arithmetic on the model's shape, the data and the machine. Pure, no torch.

The figures describe Luthier's own engine: packed rows without padding, attention without masks, a head that is applied
only where a token is learnt. `tests/test_estimate.py` and `benchmarks/estimates.py` hold them against measurements.
"""

from __future__ import annotations

import math
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict

from app.machine import Machine
from app.shapes import Shape
from app.spec import JobSpec, RunSettings
from app.strategies import Strategy
from app.strategies._base import Memory

FLOOR_CPU_BYTES = 532 * 2**20
"""A trainer with its libraries loaded and no model: measured with torch 2.13 and transformers 5.23."""
SCORES_CPU_BYTES = 140 * 2**20
"""scikit-learn and scipy, which score classes."""
FLOOR_CUDA_BYTES = 700 * 2**20
"""What the CUDA context, the libraries' workspaces and the allocator's rounding take on the card."""
HOLES = 0.15
"""Share by which kept bf16 activations take more of a processor's memory than they hold: float32 pieces that come and go between
them leave holes. Measured on LoRA over a 135 M model at 192, 512 and 1,024 tokens; without bf16 there was none."""
LOGITS_BYTES = 96 * 2**20
LOGITS_CUDA_BYTES = 2**30
"""Chunks of float32 logits in `worker/loss.py`."""

SPEED_PER_CORE = 35e9
SPEED_PER_CORE_MATRIX_UNITS = 120e9
SPEED_GPU = 150e12
"""Operations per second taken for granted until a job has been measured on this machine."""

LOAD_SECONDS = 8.0
PROBE_TOKENS = 4000
ANSWERED = 8
"""The general texts of `worker/probe/`, and the held-out rows that a final evaluation answers."""


class Stats(Protocol):
    """What is known of a dataset. Token figures are None until they were counted."""

    rows: int
    characters: int
    tokens: int | None
    trained_tokens: int | None
    longest: int | None


class MemoryParts(BaseModel):
    weights: int
    gradients: int
    optimizer: int
    activations: int
    other: int


class Estimate(BaseModel):
    """Bytes and seconds. `low_seconds` to `high_seconds` is the range to expect."""

    model_config = ConfigDict(frozen=True)

    memory_bytes: int
    memory: MemoryParts
    seconds: float
    low_seconds: float
    high_seconds: float
    trainable_parameters: int
    fits: bool
    steps: int
    tokens: int
    tokens_per_second: float
    recomputed_layers: int = 0
    device: Literal["cpu", "cuda"] = "cpu"


def estimate(spec: JobSpec, stats: Stats, machine: Machine) -> Estimate:
    """What the job will take on this machine."""
    shape, run, strategy = spec.model.shape, spec.run, spec.strategy
    each = sequences_per_row(spec)
    rows, longest = tokens_of(stats, run, each)
    # A row's sequences share a pack, and placeholders stand before each of them.
    rows, longest = rows + each * stats.rows * strategy.virtual_tokens(), each * (longest + strategy.virtual_tokens())
    held_out = 0.0 if spec.validation else run.validation_fraction
    train_tokens = rows * (1 - held_out) * run.data_fraction
    steps = total_steps(train_tokens, run)
    tokens = int(min(run.epochs * train_tokens, steps * run.max_tokens_per_step))
    recompute = recomputed_layers(shape, strategy, run, longest, machine)
    memory = memory_of(shape, strategy, run, longest, machine, recompute, spec.task)
    total = sum(memory.model_dump().values())
    learnt = 0.0 if spec.task == "classification" else learnt_share(stats)
    seconds, per_second = _seconds(spec, machine, tokens, steps, (train_tokens, rows * held_out), learnt, recompute / shape.layers)
    if spec.task == "preference":  # the model before tuning reads every pair once
        seconds += rows * operations_per_token(shape, strategy, learnt) / 2 / speed_of(spec, machine)
    known = strategy.name in machine.speeds
    spread = 1.25 if known else 2.0
    return Estimate(
        memory_bytes=total,
        memory=memory,
        seconds=seconds,
        low_seconds=seconds / spread,
        high_seconds=seconds * spread,
        trainable_parameters=strategy.trainable(shape),
        fits=total <= 0.95 * machine.training_memory_bytes,
        steps=steps,
        tokens=tokens,
        tokens_per_second=per_second,
        recomputed_layers=recompute,
        device="cuda" if machine.cuda else "cpu",
    )


# Data -----------------------------------------------------------------------------------------------------------------


def sequences_per_row(spec: JobSpec) -> int:
    """How many sequences a row becomes: a pair is its prompt with the one answer and with the other."""
    return 2 if spec.task == "preference" else 1


def tokens_of(stats: Stats, run: RunSettings, each: int = 1) -> tuple[int, int]:
    """(tokens of all rows, tokens of the longest sequence) after cutting, with `each` sequences a row; four characters are
    a token until tokens are counted."""
    tokens = stats.tokens if stats.tokens is not None else math.ceil(stats.characters / 4) + 8 * stats.rows
    mean = tokens / max(each * stats.rows, 1)
    longest = stats.longest if stats.longest is not None else math.ceil(3 * mean)
    return min(tokens, each * stats.rows * run.max_length), max(1, min(longest, run.max_length))


def learnt_share(stats: Stats) -> float:
    """Share of the tokens that carry a loss; half when nobody counted."""
    if not stats.tokens or stats.trained_tokens is None:
        return 0.5
    return min(1.0, stats.trained_tokens / stats.tokens)


def total_steps(train_tokens: float, run: RunSettings) -> int:
    """Optimizer steps of a job whose epoch has this many tokens."""
    steps = max(1, math.ceil(run.epochs * max(1, math.ceil(train_tokens / run.max_tokens_per_step))))
    return min(steps, run.max_steps) if run.max_steps else steps


def passes(run: RunSettings, processes: int) -> int:
    """Passes of a step: as many as ordered, or the next number that so many processes share evenly."""
    return -(-run.accumulation // processes) * processes


def pack_tokens(run: RunSettings, longest: int, processes: int = 1) -> int:
    """Tokens of one pass: a step's share, or the longest row where that is more."""
    return max(math.ceil(run.max_tokens_per_step / passes(run, processes)), longest)


# Memory ---------------------------------------------------------------------------------------------------------------


def precision_of(run: RunSettings, strategy: Strategy, machine: Machine) -> Literal["fp32", "bf16"]:
    """The number format a job runs in: as asked, or bf16 where the machine gains by it."""
    if run.precision != "auto":
        return run.precision
    return "bf16" if machine.cuda or (machine.bf16_pays and strategy.learns_in_bf16()) else "fp32"


def layer_bytes(shape: Shape, strategy: Strategy, half: bool, cuda: bool) -> tuple[int, int]:
    """What one layer keeps for the backward pass: (bytes per token, bytes besides).

    Any gradient on its way through needs what the norms read, the queries, keys, values and results of attention, and in a
    gated feed-forward the gate, its activation and what it is multiplied with. On a CPU attention is float32 even in bf16.
    What learns adds its own. Counted tensor by tensor; `tests/worker/test_memory.py` holds it against autograd's own count.
    """
    compute = 2 if half else 4
    island = compute if cuda else 4
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norms = shape.norms_per_layer * shape.hidden + (q + kv if shape.qk_norm else 0)
    read = compute if strategy.adapter else island  # what passes between the layers is as wide as the frozen weights
    passing = norms * read + (2 * q + 2 * kv) * island + (3 if shape.gated else 1) * shape.intermediate * compute
    passing += 4 * shape.heads if cuda else 0  # the logarithms of the softmax's sums, which the GPU's attention keeps
    own = strategy.kept(shape)
    per_token = passing + own.per_token * compute
    # Weights kept in float32 are rounded to bf16 for the products, and the rounded ones are kept until the gradient has passed.
    rounded = 2 * sum(x.inputs * x.outputs for x in shape.linears()) if half and not strategy.adapter else 0
    return per_token, own.once * compute + rounded


def head_bytes(shape: Shape, tokens: int, half: bool, trained: bool, cuda: bool) -> int:
    """The chunk of logits that is alive at once in `worker/loss.py`, the gradient of the hidden states, and a trained head's own."""
    width = 2 if half and not cuda else 4
    chunk = min(tokens * shape.vocabulary * width, LOGITS_CUDA_BYTES if cuda else LOGITS_BYTES)
    head = shape.vocabulary * shape.hidden
    # The head rounded to bf16, its gradient in float32, and a chunk's part of it before it is added.
    own = head * (4 + 2 + 2 if half else 4) if trained else 0
    return (2 if cuda else 1) * chunk + 8 * tokens * shape.hidden + own


def attention_bytes(shape: Shape, tokens: int, longest: int) -> int:
    """What the GPU's attention takes on its way back through one layer: its queries' gradient in float32, heads widened to a
    multiple of 32, with 128 rows to spare for each place of the table of sequences. (`worker/attention.py:frame_of` gives it
    twice the places that are usual; rows are taken to be a third as long as the longest in the mean.)"""
    places = math.ceil(2 * tokens / max(longest / 3, 1)) + 16 + math.ceil(tokens / longest)
    return 4 * (tokens + 128 * min(places, tokens)) * shape.heads * 32 * math.ceil(shape.head_dim / 32)


def spread_over(held: Memory, shape: Shape, strategy: Strategy, processes: int) -> Memory:
    """What each of several processes holds where they share the weights themselves (`worker/shards.py`): its rows of the blocks,
    all of the rest, and two gathered blocks, the one at work and the next."""
    if strategy.adapter or processes == 1:
        return held
    blocks = shape.layers * shape.layer_parameters()
    kept = 1 - blocks / shape.parameters() * (1 - 1 / processes)
    gathered = 2 * 4 * shape.layer_parameters()
    return Memory(int(held.weights * kept) + gathered, int(held.gradients * kept) + gathered, int(held.optimizer * kept))


def memory_of(
    shape: Shape, strategy: Strategy, run: RunSettings, longest: int, machine: Machine, recompute: int, task: str = "generation"
) -> MemoryParts:
    """Peak bytes of each process by what holds them, with the activations of `recompute` layers made anew in the backward pass."""
    half = precision_of(run, strategy, machine) == "bf16"
    frozen_bytes = 2 if half and strategy.adapter else 4
    whole = strategy.memory(shape, weight_bytes=frozen_bytes, optimizer_bytes=2 if run.optimizer == "adamw_8bit" else 8)
    loaded = whole.weights
    if run.frozen_weights == "fp8":  # a byte each, and four for the scale of a row
        saved = shape.layers * sum((frozen_bytes - 1) * x.inputs * x.outputs - 4 * x.outputs for x in shape.linears())
        whole = whole._replace(weights=whole.weights - saved)
    held = spread_over(whole, shape, strategy, machine.processes)
    writes = task != "classification"
    unused = 0 if writes else shape.parameters() - shape.body_parameters()  # a classifier is loaded without head and pooler
    tokens, compute = pack_tokens(run, longest, machine.processes), 2 if half else 4
    per_token, once = layer_bytes(shape, strategy, half, machine.cuda)
    reached = strategy.reaches(shape)
    recompute = min(recompute, reached)
    layer = tokens * per_token + once
    kept = (reached - recompute) * layer + recompute * tokens * shape.hidden * compute + (layer if recompute else 0)
    if half and not machine.cuda:
        kept += HOLES * reached * tokens * per_token
    # What the widest part of a layer makes on the way, kept or not: forwards, and as gradients backwards.
    passing = tokens * (3 * shape.intermediate + 4 * shape.hidden) * compute
    passing += attention_bytes(shape, tokens, longest) if machine.cuda and half else 0
    everything = strategy.trainable(shape) >= shape.parameters()
    head = head_bytes(shape, tokens, half, everything and writes, machine.cuda) if writes else 0
    # Activations are freed while gradients grow, so the peak stands near the one end of the backward pass or the other; half of
    # the gradients find no room in what the activations leave, which lies in other pieces.
    table = shape.vocabulary * shape.hidden * 4 if everything else 0
    begin, end = kept + max(head, passing), held.gradients + passing + table
    peak = max(begin + (held.gradients - min(table, held.gradients)) // 2, end)
    weights = held.weights - unused * frozen_bytes
    other = FLOOR_CUDA_BYTES if machine.cuda else FLOOR_CPU_BYTES + _joined_bytes(shape, strategy, frozen_bytes)
    if not writes and not machine.cuda and type(strategy).recipe == "gradient":  # the other recipe does without peft instead
        other += SCORES_CPU_BYTES
    trains = weights + held.optimizer + peak + other
    # Reading float32 files into bf16 holds both for a moment.
    loads = FLOOR_CPU_BYTES + shape.parameters() * (4 + frozen_bytes) if frozen_bytes == 2 and not machine.cuda else 0
    if run.frozen_weights == "fp8":  # read in as they are stored, and squeezed one after the other
        loads = loaded + other
    if held is not whole:  # the model is loaded and prepared in every process, and put together again in the first to be scored
        loads = whole.weights + held.weights + held.optimizer + other
    return MemoryParts(
        weights=weights,
        gradients=held.gradients,
        optimizer=held.optimizer,
        activations=int(peak - min(held.gradients, peak)),
        other=other + max(0, int(loads - trains)),
    )


def _joined_bytes(shape: Shape, strategy: Strategy, frozen_bytes: int) -> int:
    """Where LoRA's layers share a product (`worker/lora.py`) their weights move into one matrix each; four fifths of the places
    they leave were measured not to be taken again."""
    if not strategy.adapter or not strategy.learns_in_bf16():
        return 0
    outputs = (shape.heads + 2 * shape.kv_heads) * shape.head_dim + 2 * shape.intermediate
    return 4 * shape.layers * shape.hidden * outputs * frozen_bytes // 5 if shape.gated else 0


def recomputed_layers(shape: Shape, strategy: Strategy, run: RunSettings, longest: int, machine: Machine) -> int:
    """Layers whose activations are recomputed: none or all as asked, or as few as let each process fit in nine tenths of its memory."""
    if run.gradient_checkpointing != "auto":
        return shape.layers if run.gradient_checkpointing == "all" else 0
    limit = 0.9 * machine.training_memory_bytes
    for layers in range(shape.layers + 1):
        if sum(memory_of(shape, strategy, run, longest, machine, layers).model_dump().values()) <= limit:
            return layers
    return shape.layers


# Time -----------------------------------------------------------------------------------------------------------------


def operations_per_token(shape: Shape, strategy: Strategy, learnt: float, recompute: float = 0.0) -> float:
    """Floating-point operations of one training step per token: 2 per weight forwards, 2 back through it as far as gradients
    reach, and 2 more per weight that learns; `recompute` is the share of layers run forwards twice. The head counts only where
    tokens are learnt."""
    blocks = sum(x.inputs * x.outputs for x in shape.linears()) * shape.layers
    head = shape.vocabulary * shape.hidden * learnt
    learns = min(strategy.trainable(shape), blocks + head)
    passed = blocks * strategy.reaches(shape) / shape.layers
    return 2 * (blocks + head) + 2 * (passed + head) + 2 * learns + 2 * recompute * blocks


def speed_of(spec: JobSpec, machine: Machine) -> float:
    """Operations per second to expect: as measured here before, or a cautious figure."""
    if measured := machine.speeds.get(spec.strategy.name):
        return measured
    if machine.cuda:
        return SPEED_GPU * machine.processes
    matrix_units = machine.bf16_pays and precision_of(spec.run, spec.strategy, machine) == "bf16"
    return machine.cores * (SPEED_PER_CORE_MATRIX_UNITS if matrix_units else SPEED_PER_CORE)


def _seconds(
    spec: JobSpec, machine: Machine, tokens: int, steps: int, rows: tuple[float, float], learnt: float, recompute: float
) -> tuple[float, float]:
    """(seconds of the job, training tokens per second). `rows` are the tokens of the training rows and of those held out."""
    shape, run, speed = spec.model.shape, spec.run, speed_of(spec, machine)
    work = operations_per_token(shape, spec.strategy, learnt, recompute)
    train, held_out = rows
    evaluations = 2 + math.ceil(run.evaluations_per_epoch * tokens / max(train, 1))
    forward = work / 2
    written = run.samples * run.sample_tokens * (evaluations + 1) + (2 * ANSWERED * run.sample_tokens if run.samples else 0)
    # At the end every training row is scored with the model before and after, and so are the texts that show forgetting.
    after = (2 * train if run.row_losses else 0) + (2 * PROBE_TOKENS if run.forgetting else 0)
    # Writing answers one token at a time is bound by reading the weights, about ten times slower per token than training.
    answers = written * 10 * forward / speed
    scored = (evaluations * held_out + after) * forward
    return LOAD_SECONDS + (tokens * work + scored) / speed + answers + 0.01 * steps, speed / work
