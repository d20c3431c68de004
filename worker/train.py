"""The gradient recipe, top to bottom: an order goes in, events come out.

    list(train(spec, folder))

is a whole job, with no database, queue or process around it.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from app import events
from app.planning.memory import recomputed_layers
from app.settings import get_settings
from app.spec import JobSpec
from worker.kernels.cpu import gradient_buffers
from worker.kernels.cpu.full_tuning import learns_whole, patch_full_tuning, release_memory
from worker.kernels.cpu.gradient_buffers import MasterWeight
from worker.kernels.cpu.rotary import use_fused_rotary
from worker.modeling import fused_layers, packed_attention
from worker.modeling.classifier import plain
from worker.modeling.loading import load_tokenizer
from worker.runtime import distributed
from worker.runtime.device import Compute, choose, memory_here, peak_memory, release, rng_tensors, set_rng
from worker.runtime.failures import Diverged, memory_ran_out
from worker.runtime.progress import ProgressReporter
from worker.runtime.transfer import AsyncScalars, depth
from worker.training import checkpoint, final_evaluation, neftune, optim
from worker.training.checkpoint import State, measured, relative, spec_digest
from worker.training.export import export
from worker.training.loss_scale import LossScale
from worker.training.objectives import objective_of
from worker.training.objectives._base import EvalResult, Objective, body_of, trained_parameters
from worker.training.schedule import Schedule, course_of, seconds_expected
from worker.training.step import next_window, parts_of, take_step

MAX_NOT_FINITE = 3
MAX_OVERFLOWS = 20
"""The same in fp16, where the first steps may look for the factor on their loss."""
DIVERGED_STEPS = 15
"""Steps in a row whose loss is far above that of the first ones, after which a job is given up."""
SPEED_WINDOW = 20


@dataclass
class StopSignals:
    """What others ask of a running job, looked at after every optimizer step; and whether it `stopped` for it, its state saved."""

    stop: bool = False
    save: bool = False
    stopped: bool = False


@dataclass
class TrainState:
    """Everything that lives while a job trains."""

    spec: JobSpec
    attempt: Path
    engine: Compute
    lesson: Objective
    course: Schedule
    model: torch.nn.Module
    trained: optim.Named
    optimizer: torch.optim.Optimizer
    state: State
    parts: int  # how many parts of a pack are computed side by side
    wholes: list[MasterWeight]  # the weights of full tuning on a CPU
    began: float  # monotonic, for the seconds of everything
    pace: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=SPEED_WINDOW))
    lap: float = 0.0
    world: distributed.ProcessGroup = field(default_factory=distributed.ProcessGroup)
    factors: Any = None  # worker.kernels.cpu.lora_step.LoraOptimizer, for LoRA on a CPU with matrix units
    scale: LossScale | None = None  # of a job in fp16
    shards: Any = None  # worker.training.fsdp.Shards, where several processes share the weights themselves
    pieces: list[Path] | None = None  # what each of them wrote of the optimizer's state

    @property
    def apart(self) -> bool:
        """Whether parts side by side each have gradients of their own, added afterwards: those of an adapter take no room."""
        return self.parts > 1 and type(self.spec.strategy).adapter

    def added_in_order(self) -> list[torch.nn.Parameter]:
        """Whose gradients wait for their turn: all others of a job in parts."""
        return [] if self.parts == 1 or self.apart else list(self.trained.values())

    @property
    def stopped_early(self) -> bool:
        patience = self.spec.run.early_stopping_patience
        return bool(patience) and self.state.without_better >= patience


def train(spec: JobSpec, folder: Path, runs: Path | None = None, control: StopSignals | None = None) -> Iterator[events.TrainerEvent]:
    """Tune `spec.model` and say what happens; the result is written under `folder`, an attempt's folder.

    Goes on from the newest whole checkpoint under `runs` (by default the folder's parent). Ends after `Finished`, or without
    it when `control.stop` was set and the state was saved. Raises BadData, BadModel, DoesNotFit, Diverged, or what torch raises.
    """
    control = control or StopSignals()
    began = time.monotonic()
    if type(spec.strategy).recipe == "features":
        if distributed.rank():
            return  # the model is read once, by the first process
        from worker.training.train_on_features import train_on_features

        yield from train_on_features(spec, folder, control, began)
        return
    digest = spec_digest(spec)
    spec = distributed.spread(spec)
    run, strategy = spec.run, spec.strategy
    found = checkpoint.newest(runs or folder.parent)
    state = checkpoint.read_state(found) if found else State()

    torch.manual_seed(run.seed)
    engine = choose(run, strategy, state.facts)
    if engine.device.type == "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing here reads memory that it has not written

    lesson = objective_of(spec, load_tokenizer(spec.model))
    course = course_of(lesson, engine)
    yield from (_log("warn", text) for text in lesson.remarks())

    model = lesson.load(engine)
    fused_layers.use_fused_layers(model)
    use_fused_rotary(model, engine.device)
    if not found:
        state.base_answers = lesson.base_answers(model, engine)
    yield from ProgressReporter("Reading the rows with the base model")(lesson.prepare(model, engine, folder, course.budget))
    recompute = recomputed_layers(spec.model.shape, strategy, run, max(lesson.train.lengths), memory_here(engine.device), spec.task)
    if run.gradient_checkpointing == "auto" and memory_ran_out(runs or folder.parent):
        recompute = spec.model.shape.layers
        yield _log("warn", "The GPU's memory ran out, so the activations of every layer are now recomputed: the same result, more slowly.")
    model = lesson.attach(model).train()
    if run.neftune_noise_alpha:
        neftune.add_noise(plain(model), run.neftune_noise_alpha)
    recompute = fused_layers.recompute_layers(plain(model), recompute, strategy.reaches(spec.model.shape))
    if engine.framed and spec.model.shape.architecture == "decoder":
        fused_layers.round_embeddings(plain(model), engine.compute)
    # Packs of pairs, of texts or of so many rows have many shapes, so compiled layers would be compiled again and again.
    done = fused_layers.speed_up(body_of(model), engine, seconds_expected(spec, course) if lesson.frames else 0.0)
    trained = trained_parameters(model)
    wholes = patch_full_tuning(body_of(model), engine) if learns_whole(strategy, engine) else []
    optimizer = optim.optimizer_of(trained, spec)

    strategy.begin(body_of(model), course.total_steps)

    parts = parts_of(lesson, model, engine, course)
    facts = {**engine.facts(), "parts": parts, "spec": digest, "dataset": spec.dataset.sha256}
    if wholes:
        facts["whole"] = "apart" if gradient_buffers.keep(wholes, parts, run.passes, optimizer) else True
    if strategy.arithmetic > 1:
        facts["arithmetic"] = strategy.arithmetic
    exact = not found or (state.facts == facts and engine.device.type == "cpu")  # a GPU's sums come in any order
    if found:
        checkpoint.load_weights(found, trained)
        if not distributed.spreads(strategy):
            optim.load_state(optimizer, trained, checkpoint.read_optimizer(found))
        strategy.restore(body_of(model), checkpoint.read_tensors(found, "extra"))
        set_rng(checkpoint.read_tensors(found, "rng"), engine.device)
        yield from _differences(state.facts, facts)
    state.facts = facts
    job = TrainState(spec, folder, engine, lesson, course, model, trained, optimizer, state, parts, wholes, began - state.wall_seconds)
    job.scale = LossScale(engine.device) if engine.precision == "fp16" else None
    if hasattr(body_of(model), "peft_config"):
        from worker.modeling import fused_lora

        job.factors = fused_lora.keep(body_of(model), parts, engine, optimizer)
    yield started(job, state.step if found else None, exact, {**done, "recomputed_layers": recompute}, time.monotonic() - began)
    del model, trained, optimizer, wholes  # `job` alone holds them, so that it can let go of them

    release(engine.device)  # what was needed so far lies where threads beside each other do not find it
    with distributed.together(engine.device) as job.world, engine.abreast.in_order(job.added_in_order()):
        yield from _steps(job, control, found)
    if job.world.first and not control.stopped:
        yield from finish(job)


def _steps(job: TrainState, control: StopSignals, saved: Path | None) -> Iterator[events.TrainerEvent]:
    """Optimizer steps until the end, until validation no longer improves, or until a stop is asked for and the state is saved. They
    go on from the checkpoint `saved`."""
    run, state, course, lesson, world = job.spec.run, job.state, job.course, job.lesson, job.world
    world.even(job.trained.values())
    if world.first and state.evaluated_at < 0:
        yield from evaluate(job)
    world.wait()
    if distributed.spreads(job.spec.strategy):
        from worker.training import fsdp  # most jobs do without

        job.shards = fsdp.spread(job, saved)
    packs = course.packs(lesson.train.lengths, run, state.step * run.passes)
    late: deque[tuple[events.Step, AsyncScalars]] = deque()
    unread = depth(job.engine.device)
    job.lap = time.perf_counter()
    before, window = state.step, next_window(job, packs)
    while state.step < course.total_steps and not any(world.agree(job.stopped_early)):
        figures = AsyncScalars(take_step(job, window))
        late.append((_step_event(job), figures))
        # While a GPU computes this step the next one is laid out, and the figures of the one before are read: it never waits.
        window = next_window(job, packs)
        while len(late) > unread:
            yield report(job, *late.popleft())
        if state.step == before + 2 and (missed := fused_layers.given_up()):
            yield _log(
                "warn", f"The compiler gave up on {missed} pieces of the model; they run as they are. `luthier doctor` may show why."
            )
        # Wishes are only ever added to what was heard: one may come while the others are asked.
        stop, saving = world.agree(control.stop, control.save)
        if course.due(state.step) or course.saves(state.step) or saving or stop:
            while late:
                yield report(job, *late.popleft())
            with fsdp.whole(job) if job.shards else contextlib.nullcontext():
                if world.first:
                    if course.due(state.step):
                        yield from evaluate(job)
                    if course.saves(state.step) or saving or stop or (run.load_best and state.best_step == state.step):
                        yield save(job)
            world.wait()
            control.save = False
            if stop and state.step < course.total_steps:
                control.stopped = True
                return
            job.lap = time.perf_counter()
    if job.shards:
        fsdp.join(job)
        job.shards = None


# Before the first step ------------------------------------------------------------------------------------------------


def started(job: TrainState, resumed_from: int | None, exact: bool, done: dict[str, Any], seconds: float) -> events.Started:
    lesson, model = job.lesson, job.model
    return events.Started(
        device=job.engine.name,
        precision=job.engine.precision,
        total_steps=job.course.total_steps,
        train_rows=len(lesson.train),
        validation_rows=len(lesson.held_out),
        train_tokens=lesson.train.tokens,
        trainable_parameters=sum(p.numel() for p in job.trained.values()),
        parameters=sum(p.numel() for p in model.parameters()),
        resumed_from=resumed_from,
        exact=exact,
        seconds_to_load=seconds,
        details={
            **job.state.facts,
            "attention": packed_attention.NAME,
            **done,
            "tokens_per_pass": job.course.budget,
            "longest_row": max(lesson.train.lengths),
        },
    )


def _differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[events.Log]:
    changed = [f"{key}: {before.get(key)} → {value}" for key, value in now.items() if before.get(key) != value]
    if changed:
        yield _log("warn", f"Resumed, but not bit for bit, because something changed ({'; '.join(changed)}).")


def _log(level: str, message: str) -> events.Log:
    return events.Log(level=level, message=message)


# What is told of a step ------------------------------------------------------------------------------------------------


def _step_event(job: TrainState) -> events.Step:
    """The step as far as it is known without waiting for the device."""
    state = job.state
    return events.Step(
        step=state.step,
        epoch=round(state.step * job.spec.run.passes / job.course.packs_per_epoch, 4),
        loss=0.0,
        learning_rate=job.optimizer.param_groups[0]["lr"],
        grad_norm=0.0,
        tokens=state.tokens,
        trained_tokens=state.trained_tokens,
        tokens_per_second=0.0,
        memory_bytes=0,
        seconds=0.0,
    )


def report(job: TrainState, step: events.Step, figures: AsyncScalars) -> events.Step:
    """The finished event of a step. Raises Diverged after several steps in a row without a finite loss."""
    state = job.state
    read = figures.read()
    loss_value, norm_value = read[:2].tolist()
    now = time.perf_counter()
    state.seconds += now - job.lap
    job.lap = now
    job.pace.append((step.tokens, state.seconds))
    state.not_finite = 0 if math.isfinite(loss_value) and math.isfinite(norm_value) else state.not_finite + 1
    if state.not_finite >= (limit := MAX_OVERFLOWS if job.scale else MAX_NOT_FINITE):
        raise Diverged(
            f"The loss was not a finite number in {limit} steps in a row, the last being step {step.step}.",
            hint=f"Lower the learning rate to {job.spec.learning_rate / 10:.1g}, or raise the warm-up.",
        )
    watch_divergence(job, step.step, loss_value)
    return step.model_copy(
        update={
            "loss": loss_value,
            "metrics": job.lesson.name_metrics(read[2:]) if len(read) > 2 else {},
            "grad_norm": norm_value,
            "tokens_per_second": _speed(job),
            "memory_bytes": peak_memory(job.engine.device),
            "seconds": state.seconds,
        }
    )


def watch_divergence(job: TrainState, step: int, loss: float) -> None:
    """Stop a job whose loss has left its start far behind: each of the newest steps above twice that of the first ones and a nat more.
    A few hard packs, or new layers that overshoot at first, do not stay there so long. Raises Diverged."""
    state = job.state
    if len(state.first_losses) < 3:
        state.first_losses = [*state.first_losses, loss]
    state.recent_losses = [*state.recent_losses[-DIVERGED_STEPS + 1 :], loss]
    began, now = statistics.median(state.first_losses), min(state.recent_losses)
    if len(state.recent_losses) == DIVERGED_STEPS and now > 2 * abs(began) + 1:
        raise Diverged(
            f"The training loss rose from {began:.3g} and stayed above {now:.3g} until step {step}: the weights move too far at each step.",
            hint=f"Lower the learning rate to {job.spec.learning_rate / 10:.1g}, or raise the warm-up.",
        )


def _speed(job: TrainState) -> float:
    """Tokens per second over the last steps of this attempt, evaluations left out."""
    (tokens, seconds), (last_tokens, last_seconds) = job.pace[0], job.pace[-1]
    if last_seconds > seconds:
        return (last_tokens - tokens) / (last_seconds - seconds)
    return job.state.tokens / job.state.seconds if job.state.seconds else 0.0


# Now and then ---------------------------------------------------------------------------------------------------------


def evaluate(job: TrainState) -> Iterator[events.Doing | events.Evaluated | events.Sampled]:
    """Score the held-out rows and write the sample answers; remember whether this is the best so far."""
    state, lesson = job.state, job.lesson
    state.evaluated_at = state.step
    if len(lesson.held_out):
        began = time.monotonic()
        scored = yield from ProgressReporter("Scoring the validation rows")(lesson.validate(job.model, job.course.budget, job.engine))
        best = _remember(job, scored)
        rest = {key: value for key, value in scored.metrics.items() if key != "loss"}
        seconds = time.monotonic() - began
        yield events.Evaluated(step=state.step, loss=scored.metrics["loss"], metrics=rest, best=best, seconds=seconds)
    samples = lesson.samples(job.model, state, job.engine)
    if samples:
        yield events.Sampled(step=state.step, samples=samples)


def _remember(job: TrainState, scored: EvalResult) -> bool:
    state, loss = job.state, scored.metrics["loss"]
    metric = job.spec.run.metric_for_best
    value = loss if metric == "loss" else -scored.metrics[job.lesson.accuracy]
    state.curve = [*state.curve, (state.step, loss)]
    state.last, state.last_rows = scored.metrics, scored.rows
    if state.step == 0:
        state.before, state.base_rows = scored.metrics, scored.rows
        return False
    if state.best_loss is not None and not value < state.best_loss:
        state.without_better += 1
        return False
    state.best, state.best_rows, state.best_loss, state.best_step, state.without_better = scored.metrics, scored.rows, value, state.step, 0
    state.best_path = relative(job.attempt / f"checkpoint-{state.step}")
    return True


def save(job: TrainState) -> events.Saved:
    """Write a checkpoint, and sweep the ones no longer needed."""
    state = job.state
    state.wall_seconds = time.monotonic() - job.began
    tensors = job.pieces or optim.state_tensors(job.optimizer, job.trained)
    rng = rng_tensors(job.engine.device)
    written = checkpoint.save(job.attempt, state, job.model, job.spec.strategy, job.lesson.tokenizer, job.trained, tensors, rng)
    run = job.spec.run
    keep = run.save_total_limit or get_settings().keep_checkpoints
    checkpoint.prune(job.attempt, keep, state.best_path if run.load_best else None)
    return events.Saved(
        step=state.step,
        path=relative(written.path),
        bytes=written.bytes,
        manifest_sha256=written.manifest_sha256,
        metrics=state.last if state.evaluated_at == state.step else {},
        best=state.best_step == state.step,
    )


def finish(job: TrainState) -> Iterator[events.Log | events.Doing | events.Finished]:
    """Write the result: the best checkpoint's weights where rows were held out and it is asked for, else the last ones. Then base and result are
    measured on the same rows and texts, one after the other, so that both are never in memory together."""
    state, spec, lesson = job.state, job.spec, job.lesson
    if job.factors:
        job.factors.give_back()
        job.factors = None
    if not spec.run.load_best and state.best_step is not None:
        state.best, state.best_rows, state.best_step = state.last, state.last_rows, state.step
    elif state.best_path and state.best_step != state.step:
        best = get_settings().data_dir / state.best_path
        checkpoint.load_weights(best, job.trained)
        spec.strategy.restore(body_of(job.model), checkpoint.read_tensors(best, "extra"))  # what it settled later fits other weights
    written, revision, adapter = export(job.attempt, spec, job.model, lesson.tokenizer, state)
    release_memory(job.wholes)
    job.optimizer, job.trained, job.wholes = None, {}, []  # type: ignore[assignment]  # their memory is needed
    compared = yield from final_evaluation.compare(job)
    state.wall_seconds = time.monotonic() - job.began
    yield events.Finished(
        reason="completed" if state.step >= job.course.total_steps else "early_stopped",
        step=state.step,
        path=relative(written.path),
        bytes=written.bytes,
        revision=revision,
        adapter_sha256=adapter,
        kind=lesson.kind(),
        best_step=state.best_step,
        labels=lesson.labels or (list(spec.model.labels) if spec.model.labels else None),
        measured=measured(state, job.engine),
        forgetting=compared.forgetting,
        evaluation=compared.evaluation,
    )
