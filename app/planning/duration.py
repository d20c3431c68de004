"""Estimates the memory and time of a job from the model's shape, the data and the machine. Pure, no torch.

The numbers describe Luthier's own trainer: packed rows without padding, attention without masks, a head that is applied only to
tokens with a loss. `tests/planning/test_memory.py` and `benchmarks/estimates.py` compare them with measurements.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict

from app import formats
from app.machines.hardware import Machine, Pace, kind_of_work
from app.objectives import OBJECTIVES, DrawnSettings
from app.planning import rehearsal
from app.planning.memory import MemoryParts, features_memory, fitted_memory, new_token_parameters, pads, precision_of
from app.run_settings import RunSettings
from app.shapes import Shape
from app.spec import JobSpec
from app.strategies import Strategy
from app.strategies.feature_extraction import FeatureExtraction

SPEED_PER_CORE = 35e9
SPEED_PER_CORE_MATRIX_UNITS = 120e9
SPEED_GPU = 150e12
"""Operations per second assumed until a job has been measured on this machine."""

FITS = 0.95
"""A job fits that takes at most this share of the memory."""
FIXED_SECONDS = 4.0
"""Loading libraries, tokenizing rows and writing results, until a job has been measured here; loading the weights is added."""
MIN_BESIDE, MIN_FIXED_SECONDS = 0.1, 0.1
"""Minimum of the work beside a job's steps, as a share of its arithmetic, and of the fixed seconds."""
DISK_BYTES_PER_SECOND = 400e6
"""Loading weights, or writing them with their SHA-256."""
PROBE_TOKENS = 4000
ANSWERED = 8
"""The general texts of `worker/scoring/probe/`, and the validation rows that a final evaluation answers."""
SHOTS, EXAMPLES_A_CLASS, CONTEST_ROWS, CONTEST_TOKENS = 4, 16, 64, (2_048, 32_768)
"""The baselines of the verdict (worker/scoring/prompt_baseline.py): few-shot examples per question, examples per class, and
maximum validation rows and tokens, of a short and of any job."""

DRAWN_TIMES, DRAWN_MORE = 4, 16
"""An answer that is drawn is assumed to have four times as many tokens as those of the rows, and 16, but at most half of the limit."""
DRAWN_TURNS = 2
"""A conversation with tools is assumed to have so many answers, or fewer where fewer are allowed."""
DRAWN_WORK = 2.5
"""A token that is drawn in a large batch takes as long as the forward pass of so many in training."""

FIT_SWEEPS, FIT_PASSES = 13, 60
"""Logistic regression takes as long as 13 fits (cross-validation of six strengths in three folds of two thirds each, and the
final one), each in some 60 passes; where the strength is given, as one."""
FIT_ROWS = 3000
"""Maximum rows of the cross-validation."""
DENSE_ROW_SECONDS = 5e-6
"""Time per row of a dense classifier's step beyond its products."""
FIT_OPERATIONS_PER_SECOND = 50e9
"""What scikit-learn's solver reached on one core, float32, for 10 to 77 classes of 384 and 576 dimensions."""


class Stats(Protocol):
    """What is known of a dataset. Token counts are None until they were counted."""

    rows: int
    characters: int
    tokens: int | None
    trained_tokens: int | None
    longest: int | None
    labels: int | None


class Estimate(BaseModel):
    """Bytes and seconds. `low_seconds` to `high_seconds` is the expected range."""

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


def estimate(spec: JobSpec, stats: Stats, machine: Machine, validation: Stats | None = None) -> Estimate:
    """Estimate of a job on this machine. `validation` is what is known of the rows of `spec.validation`."""
    machine, course = machine.on(spec.run.device), course_of(spec, stats, validation, cuda=machine.cuda)
    if type(spec.strategy).recipe == "features":
        return _of_features(spec, course, machine)
    shape, run, strategy = spec.model.shape, spec.run, spec.strategy
    recompute, memory = fitted_memory(shape, strategy, run, course.longest, machine, spec.task)
    if spec.teacher:
        width = 4 if precision_of(run, strategy, machine) == "fp32" else 2
        memory = memory.model_copy(update={"other": memory.other + width * spec.teacher.shape.parameters()})
    work = work_per_token(spec, course.trained_share, recompute / shape.layers)
    per_second = speed_of(spec, machine) / work
    return _estimate(spec, machine, course, memory, per_second, recompute)


def _estimate(spec: JobSpec, machine: Machine, course: Workload, memory: MemoryParts, per_second: float, recompute: int = 0) -> Estimate:
    twice = recompute / spec.model.shape.layers
    speed = speed_of(spec, machine)
    found, measured = pace_of(spec, machine)
    seconds = step_seconds(spec, course, speed, twice) + (found.beside if found else 1.0) * beside_seconds(spec, course, speed)
    seconds += found.fixed_seconds if found else FIXED_SECONDS + _read_seconds(spec.model.shape)
    total = memory.total
    spread = 1.25 if measured else 1.5 if found else 2.0
    return Estimate(
        memory_bytes=total,
        memory=memory,
        seconds=seconds,
        low_seconds=seconds / spread,
        high_seconds=seconds * spread,
        trainable_parameters=spec.strategy.trainable_parameters(spec.model.shape, task=spec.task, labels=course.labels)
        + new_token_parameters(spec.model.shape, spec.run),
        fits=total <= FITS * machine.training_memory_bytes,
        steps=course.steps,
        tokens=course.tokens,
        tokens_per_second=per_second,
        recomputed_layers=recompute,
        device="cuda" if machine.cuda else "cpu",
    )


# Data -----------------------------------------------------------------------------------------------------------------


class Workload(NamedTuple):
    """How a job goes through its data. All but `steps`, `rows` and `labels` are in tokens, including virtual tokens."""

    train: float  # of the training rows, once
    held_out: float
    longest: int  # of the longest sequence, after truncation
    tokens: int  # of all steps, general rows included
    own: int  # of them, those of training rows
    steps: int
    trained_share: float  # share of the tokens with a loss
    rows: int  # training rows
    labels: int


def course_of(spec: JobSpec, stats: Stats, validation: Stats | None = None, *, cuda: bool = False) -> Workload:
    """The workload of a job, on a GPU or on a CPU."""
    if isinstance(spec.preference, DrawnSettings):
        return drawn_course_of(spec, spec.preference, stats, cuda)
    run = spec.run
    rows, longest = _placed(spec, stats)
    if spec.validation is None:
        held_out, share = rows * run.validation_fraction, (1 - run.validation_fraction) * run.data_fraction
    else:
        held_out, share = 0.0, run.data_fraction
        if validation is not None:
            held_out, _ = _placed(spec, validation)
    train = rows * share
    learned_from = math.ceil(stats.rows * share)
    mean = train / max(learned_from, 1)
    steps = total_steps(train, learned_from, longest, run, pads=pads(spec.model.shape, run))
    own = int(min(run.epochs * train, steps * run.step_tokens(mean)))
    tokens = int(own / (1 - run.rehearsal_fraction))
    trained_share = 0.0 if OBJECTIVES[spec.task].heads else 1.0 if run.train_on == "all_turns" else loss_share(stats)
    return Workload(train, held_out, longest, tokens, own, steps, trained_share, learned_from, stats.labels or 0)


def drawn_course_of(spec: JobSpec, own: DrawnSettings, stats: Stats, cuda: bool = False) -> Workload:
    """The workload of a job that trains on answers which it draws. Their length is assumed, since nobody knows it before."""
    run, share = spec.run, spec.run.data_fraction * (1.0 if spec.validation else 1 - spec.run.validation_fraction)
    total, longest = tokens_of(stats, run)
    prompts = max(1, math.ceil(stats.rows * share))
    prompt = total / max(stats.rows, 1) * (1 - loss_share(stats)) + spec.strategy.virtual_tokens()
    answer = drawn_tokens(own, stats) * min(own.turns, DRAWN_TURNS)
    steps = max(1, math.ceil(run.epochs * math.ceil(prompts / own.prompts_per_step) * own.updates))
    steps = min(steps, run.max_steps or steps)
    read = prompt / (own.group_size if _shares_prompts(spec, cuda) else 1) + answer
    tokens = int(steps * own.prompts_per_step * own.group_size * read)
    asked = steps / own.updates * own.prompts_per_step * prompt  # of prompts, once for all their answers: these are the rows of an epoch
    longest = run.max_length if own.turns > 1 else min(run.max_length, longest) + own.answer_tokens
    return Workload(prompts * prompt, 0.0, longest, tokens, int(asked), steps, answer / read, prompts, 0)


def _shares_prompts(spec: JobSpec, cuda: bool) -> bool:
    """Whether the answers to one prompt are packed behind it (`worker/data/shared_prompts.py`)."""
    packed = spec.model.shape.architecture == "decoder" and not pads(spec.model.shape, spec.run)
    return packed and OBJECTIVES[spec.task].rewards and not cuda and not spec.strategy.virtual_tokens()


def drawn_tokens(own: DrawnSettings, stats: Stats) -> float:
    """Mean tokens of an answer that is drawn."""
    given = (stats.trained_tokens or 0) / max(stats.rows, 1)
    return min(own.answer_tokens / 2, DRAWN_TIMES * given + DRAWN_MORE) if given else own.answer_tokens / 2


def _placed(spec: JobSpec, stats: Stats) -> tuple[float, int]:
    """(tokens of all rows, of the longest) with placeholders before each sequence; a row's sequences share a pack."""
    each, lead = OBJECTIVES[spec.task].sequences_per_row, spec.strategy.virtual_tokens()
    rows, longest = tokens_of(stats, spec.run, each)
    return rows + each * stats.rows * lead, each * (longest + lead)


def tokens_of(stats: Stats, run: RunSettings, each: int = 1) -> tuple[int, int]:
    """(tokens of all rows, tokens of the longest sequence) after truncation, with `each` sequences per row; four characters count
    as a token until tokens are counted."""
    tokens = stats.tokens if stats.tokens is not None else math.ceil(stats.characters / 4) + 8 * stats.rows
    mean = tokens / max(each * stats.rows, 1)
    longest = stats.longest if stats.longest is not None else math.ceil(3 * mean)
    return min(tokens, each * stats.rows * run.max_length), max(1, min(longest, run.max_length))


def loss_share(stats: Stats) -> float:
    """Share of the tokens with a loss; half when nobody counted."""
    if not stats.tokens or stats.trained_tokens is None:
        return 0.5
    return min(1.0, stats.trained_tokens / stats.tokens)


def total_steps(train_tokens: float, rows: int, longest: int, run: RunSettings, *, pads: bool = False) -> int:
    """Optimizer steps of a job with this many tokens and rows per epoch; `pads` says that rows are padded to the longest of their pass."""
    batches = rows / run.batch_size if run.batch_size else train_tokens / ((run.max_tokens_per_step or 1) * (1 - run.rehearsal_fraction))
    if pads and not run.batch_size:  # at most, as if every row were as long as the longest
        batches = rows / max(1, (run.max_tokens_per_step or 1) // longest)
    steps = max(1, math.ceil(run.epochs * max(1, math.ceil(batches)) / run.gradient_accumulation_steps))
    return min(steps, run.max_steps) if run.max_steps else steps


# Time -----------------------------------------------------------------------------------------------------------------


def operations_per_token(
    shape: Shape, strategy: Strategy, trained_share: float, recompute: float = 0.0, *, everywhere: bool = False, beside: int = 0
) -> float:
    """Floating-point operations of one training step per token: 2 per weight in the forward pass, 2 in the backward pass as far
    as gradients reach (`everywhere` where rows of the embedding learn), and 2 more per trained weight; `recompute` is the share of layers whose forward pass runs twice, `beside` how many tokens are read
    without gradients for each. The head counts only for tokens with a loss."""
    blocks = shape.block_products()
    head = shape.vocabulary * shape.hidden * trained_share
    learns = min(strategy.trainable(shape), blocks + head)
    passed = blocks if everywhere else blocks * strategy.reaches(shape) / shape.layers
    return 2 * (1 + beside) * (blocks + head) + 2 * (passed + head) + 2 * learns + 2 * recompute * blocks


def work_per_token(spec: JobSpec, trained_share: float, recompute: float = 0.0) -> float:
    """Floating-point operations of a job per token of its steps. Where answers are drawn, each token with a loss was drawn first,
    once for all updates on it."""
    shape = spec.model.shape
    beside, everywhere = OBJECTIVES[spec.task].beside, bool(spec.run.new_tokens)
    found = operations_per_token(shape, spec.strategy, trained_share, recompute, everywhere=everywhere, beside=beside)
    found += 2 * forward_operations(spec.teacher.shape, trained_share) if spec.teacher else 0.0  # its head is read in the backward pass too
    own = spec.preference
    return found + (DRAWN_WORK * trained_share * forward_operations(shape, 1.0) / own.updates if isinstance(own, DrawnSettings) else 0.0)


def pace_of(spec: JobSpec, machine: Machine) -> tuple[Pace | None, bool]:
    """The pace of such a job here, and whether one like it was measured."""
    return machine.pace(work_of(spec, precision_of(spec.run, spec.strategy, machine)))


def work_of(spec: JobSpec, precision: str) -> str:
    """The kind of work of a job. One architecture without formulas may be far slower than another."""
    shape = spec.model.shape
    kind = f"{shape.architecture} {shape.model_type}" if shape.structure else shape.architecture
    recipe = "drawn" if OBJECTIVES[spec.task].draws else type(spec.strategy).recipe
    return kind_of_work(spec.strategy.name, kind, recipe, precision)


def speed_of(spec: JobSpec, machine: Machine) -> float:
    """Expected operations per second: as measured here before, or of a step when the model was added, or a cautious default."""
    found, _ = pace_of(spec, machine)
    if found:
        return found.operations_per_second
    if (step := spec.model.shape.step) is not None and not machine.cuda:
        return step.operations_per_second * max(1.0, machine.cores / step.threads)
    if machine.cuda:
        return SPEED_GPU * machine.processes
    matrix_units = machine.bf16_pays and precision_of(spec.run, spec.strategy, machine) == "bf16"
    return machine.cores * (SPEED_PER_CORE_MATRIX_UNITS if matrix_units else SPEED_PER_CORE)


def _read_seconds(shape: Shape) -> float:
    return 4 * shape.parameters() / DISK_BYTES_PER_SECOND


def forward_operations(shape: Shape, trained_share: float) -> float:
    """Operations of the forward pass of one token, with the head applied to a share of them."""
    blocks = shape.block_products()
    return 2 * (blocks + shape.vocabulary * shape.hidden * trained_share)


def step_seconds(spec: JobSpec, course: Workload, speed: float, recompute: float = 0.0) -> float:
    """Seconds of all steps, or of reading every text once, at `speed` operations per second; `recompute` is the share of layers
    whose forward pass runs twice."""
    shape = spec.model.shape
    if type(spec.strategy).recipe == "features":
        return (course.train + course.held_out) * forward_operations(shape, 0.0) / speed
    padded = 1.0 if not pads(shape, spec.run) else max(1.0, course.longest * course.rows / max(course.train, 1))
    work = work_per_token(spec, course.trained_share, recompute)
    return padded * course.tokens * work / speed


def beside_seconds(spec: JobSpec, course: Workload, speed: float) -> float:
    """Seconds of a job's computations beside its steps: scores, answers, checkpoints, and a classifier trained on embeddings."""
    shape, run = spec.model.shape, spec.run
    if type(spec.strategy).recipe == "features":
        return _fit_seconds(spec, course)
    entry = OBJECTIVES[spec.task]
    classes = entry.heads
    forward = forward_operations(shape, course.trained_share)
    often = course.steps / run.eval_steps if run.eval_steps else run.evaluations_per_epoch * course.own / max(course.train, 1)
    saves = judged = max(1, math.ceil(often))
    if run.save_steps:
        saves = math.ceil(course.steps / run.save_steps)
    # Validation rows are scored before the first step and at every evaluation; classes once more at the end, for their
    # evaluation.
    scored = (judged + 1 + classes) * course.held_out
    # At the end every training row is scored, except for classes by the model before fine-tuning too, and so is the general probe;
    # an encoder has none.
    passes = (1 if classes else 2) if run.row_losses else 0
    scored += passes * course.train
    scored += entry.base_reads(spec.preference) * (course.train + course.held_out)
    scored *= (1 + entry.beside) * forward
    probed = run.forgetting and shape.architecture == "decoder"
    if probed:
        scored += 2 * PROBE_TOKENS * forward_operations(shape, 1.0)
    scored += _contest_tokens(spec, course) * forward
    # Generation is bound by reading the weights, about ten times slower per token than training.
    graded: float = run.graded_rows * run.sample_tokens * (judged + 1) if spec.graders else 0
    if isinstance(spec.preference, DrawnSettings):
        answer = course.trained_share * course.tokens / max(course.steps * spec.preference.prompts_per_step * spec.preference.group_size, 1)
        graded = answer * (run.graded_rows * (judged + 1) + getattr(spec.preference, "check_prompts", 0) * spec.preference.group_size / 4)
    written = (
        0 if classes else graded + run.samples * run.sample_tokens * (judged + 2) + (2 * ANSWERED * run.sample_tokens if run.samples else 0)
    )
    written += rehearsal.PROMPTS * rehearsal.ANSWER_TOKENS if run.rehearsal_fraction else 0  # at most: a second job finds them
    again = _read_seconds(shape) if probed or passes == 2 else 0.0
    return (scored + 10 * written * forward) / speed + again + saves * _save_seconds(spec)


def _contest_tokens(spec: JobSpec, course: Workload) -> float:
    """Tokens of validation rows that are read again for the verdict: behind examples by the base, and by the fine-tuned model;
    for a classifier, the texts whose embeddings are compared."""
    mean = course.train / max(course.rows, 1)
    held = course.held_out / max(mean, 1.0)
    entry = OBJECTIVES[spec.task]
    if entry.classifies:
        return mean * (min(EXAMPLES_A_CLASS * max(course.labels, 1), course.rows, 800) + min(held, 400))
    if not entry.few_shot or not formats.get(spec.dataset.format).asks:
        return 0.0
    bare = min(held, CONTEST_ROWS) * mean
    return bare + min(bare * (1 + SHOTS), contest_tokens(course.tokens))


def contest_tokens(trained: int) -> int:
    """Tokens that the base may read behind examples, at most: as many as the job learned from, so that the end of a short one takes no longer
    than its steps."""
    least, most = CONTEST_TOKENS
    return min(most, max(least, trained))


def pace_from(spec: JobSpec, course: Workload, speed: float, recompute: float, seconds: float, loaded: float) -> Pace | None:
    """The pace measured by a job of `seconds` in all, the first `loaded` of them before its first step. What it took longer than
    the arithmetic is fixed time; what it took less, it was faster beside its steps. None when it cannot have read its texts at
    all."""
    beside = beside_seconds(spec, course, speed)
    rest = seconds - step_seconds(spec, course, speed, recompute)
    if type(spec.strategy).recipe == "features":
        return Pace(operations_per_second=speed, fixed_seconds=rest - beside) if rest > beside else None
    share = min(1.0, max(rest - loaded, MIN_BESIDE * beside) / beside) if beside else 1.0
    return Pace(operations_per_second=speed, fixed_seconds=max(rest - share * beside, MIN_FIXED_SECONDS), beside=share)


def _save_seconds(spec: JobSpec) -> float:
    """Seconds of a checkpoint: trained weights with their two moments, and a whole model where the result is one."""
    strategy, shape = spec.strategy, spec.model.shape
    trainable = strategy.trainable(shape)
    return (12 * trainable + (0 if type(strategy).adapter else 4 * (shape.parameters() - trainable))) / DISK_BYTES_PER_SECOND


# Frozen features ------------------------------------------------------------------------------------------------------


def _of_features(spec: JobSpec, course: Workload, machine: Machine) -> Estimate:
    """Every text read once, forward only, and a small classifier trained on the embeddings."""
    strategy = spec.strategy
    assert isinstance(strategy, FeatureExtraction)
    steps = 1 if strategy.classifier == "logistic" else strategy.passes
    course = course._replace(tokens=int(course.train + course.held_out), steps=steps)
    per_second = speed_of(spec, machine) / forward_operations(spec.model.shape, 0.0)
    return _estimate(
        spec,
        machine,
        course,
        features_memory(spec.model.shape, strategy, spec.run, course.tokens, course.rows, course.longest, machine),
        per_second,
    )


def _fit_seconds(spec: JobSpec, course: Workload) -> float:
    """Seconds of training a classifier on the embeddings."""
    strategy = spec.strategy
    assert isinstance(strategy, FeatureExtraction)
    head = strategy.head_parameters(spec.model.shape, course.labels)
    if strategy.classifier == "dense":
        return strategy.passes * course.rows * (6 * head / FIT_OPERATIONS_PER_SECOND + DENSE_ROW_SECONDS)
    sweeps = 1.0 if strategy.regularisation is not None else 1 + (FIT_SWEEPS - 1) * min(1.0, FIT_ROWS / max(course.rows, 1))
    return 4 * sweeps * FIT_PASSES * course.rows * head / FIT_OPERATIONS_PER_SECOND
