"""The gradient recipe, top to bottom: a specification goes in, events come out.

    list(train(spec, folder))

is a whole job, with no database, queue or process around it. How a step is computed is the business of a backend
(`worker/training/backends/`); to follow the recipe, read the plain one.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from app import events
from app.graders import Ask, Reply, no_models
from app.planning.memory import captures_passes, reached_layers, recomputed_layers
from app.settings import get_settings
from app.spec import JobSpec
from worker.modeling import fused_layers, packed_attention
from worker.modeling.classifier import plain
from worker.modeling.loading import load_tokenizer
from worker.runtime import distributed
from worker.runtime.device import Compute, choose, memory_here, release, rng_tensors, set_rng
from worker.runtime.failures import memory_ran_out
from worker.runtime.progress import ProgressReporter
from worker.runtime.transfer import AsyncScalars, depth
from worker.training import backends, checkpoint, final_evaluation, neftune, optim
from worker.training.backends._base import StepBackend
from worker.training.checkpoint import State, measured, relative, spec_digest
from worker.training.export import export
from worker.training.graded import ModelAway, clearly_better
from worker.training.objectives import objective_of
from worker.training.objectives._base import EvalResult, TrainingObjective, body_of, trained_parameters
from worker.training.schedule import StepPlan, course_of, seconds_expected
from worker.training.step import next_batch, parts_of, take_step
from worker.training.step_report import report, step_event

SPEED_WINDOW = 20
E = TypeVar("E")
R = TypeVar("R")


@dataclass
class StopSignals:
    """What others ask of a running job, looked at after every optimizer step; and whether it `stopped` for it, its state saved."""

    stop: bool = False
    save: bool = False
    stopped: bool = False
    pause_at: int | None = None
    """The step after which it stops by itself."""
    resume_step: int | None = None
    """The step of the checkpoint that all machines of the job go on from."""


@dataclass
class TrainState:
    """Everything that lives while a job trains."""

    spec: JobSpec
    attempt: Path
    engine: Compute
    lesson: TrainingObjective
    course: StepPlan
    state: State
    backend: StepBackend  # holds the model, what is trained of it, and the optimizer
    began: float  # monotonic, for the seconds of everything
    pace: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=SPEED_WINDOW))
    lap: float = 0.0
    world: distributed.ProcessGroup = field(default_factory=distributed.ProcessGroup)

    @property
    def model(self) -> torch.nn.Module:
        return self.backend.model

    @property
    def stopped_early(self) -> bool:
        patience = self.spec.run.early_stopping_patience
        return bool(self.state.stop_reason) or (bool(patience) and self.state.without_better >= patience)


def train(
    spec: JobSpec,
    folder: Path,
    runs: Path | None = None,
    control: StopSignals | None = None,
    answer: Callable[[Ask], Reply] = no_models,
) -> Iterator[events.TrainerEvent]:
    """Tune `spec.model` and say what happens; the result is written under `folder`, an attempt's folder.

    Goes on from the newest whole checkpoint under `runs` (by default the folder's parent). Ends after `Finished`, or without
    it when `control.stop` was set and the state was saved. Graders ask models through `answer`. Raises BadData, BadModel, DoesNotFit,
    Diverged, ModelAway, or what torch raises.
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
    found = checkpoint.newest(runs or folder.parent, control.resume_step)
    state = checkpoint.read_state(found) if found else State()

    torch.manual_seed(run.seed)
    engine = choose(run, strategy, state.facts)
    if engine.device.type == "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing here reads memory that it has not written

    # The rows, and the model before and after its strategy is attached.
    lesson = objective_of(spec, load_tokenizer(spec.model))
    lesson.answer, lesson.attempt = answer, folder
    course = course_of(lesson, engine)
    yield from (_log("warn", text) for text in lesson.remarks())
    model = lesson.load(engine)
    strategy.initialize(model, run.seed)
    fused_layers.patch_layers(model, engine.device)
    if not found:
        state.base_answers = lesson.base_answers(model, engine)
    yield from ProgressReporter(lesson.preparing)(lesson.prepare(model, engine, folder, course.budget))
    yield from (_log("info", text) for text in lesson.prepared())
    model = lesson.attach(model).train()
    # Packs of so many rows have many shapes, so compiled layers would be compiled again and again.
    # Router logits are collected in passing, which the compiler takes for none of its blocks.
    seconds = seconds_expected(spec, course) if lesson.frames and "router_loss" not in lesson.facts() else 0.0
    about = spec.model.shape, strategy, run, max(lesson.step_rows.lengths), memory_here(engine.device), spec.task
    recompute = recomputed_layers(*about)
    if squeezed := recompute > 0 and run.gradient_checkpointing == "auto" and fused_layers.compiles(body_of(model), engine, seconds):
        recompute = recomputed_layers(*about, squeezed=True)  # fewer, since each keeps less
    if run.gradient_checkpointing == "auto" and memory_ran_out(runs or folder.parent):
        recompute = spec.model.shape.layers
        yield _log("warn", "The GPU ran out of memory, so the activations of every layer are now recomputed: the same result, more slowly.")
    if run.neftune_noise_alpha:
        neftune.add_noise(plain(model), run.neftune_noise_alpha)
    recompute = fused_layers.recompute_layers(plain(model), recompute, reached_layers(spec.model.shape, strategy, run))
    if engine.framed and spec.model.shape.architecture == "decoder":
        fused_layers.round_embeddings(plain(model), engine.compute)
    done = fused_layers.speed_up(body_of(model), engine, seconds, squeezed)

    # The optimizer, and the state of the checkpoint that is resumed.
    trained = trained_parameters(model)
    optimizer = optim.optimizer_of(trained, spec)
    strategy.begin(body_of(model), course.total_steps)
    graphed = bool(done.get("compiled_blocks")) and not recompute and get_settings().cuda_graphs == "auto" and captures_passes(*about)
    backend = backends.choose(engine, strategy, run, graphed)
    parts = parts_of(backend, lesson, model, engine, course)
    if found:
        checkpoint.load_weights(found, trained)
        strategy.restore(body_of(model), checkpoint.read_tensors(found, "extra"))
        lesson.after_change()
        if state.step % course.updates:
            lesson.put_back(checkpoint.read_tensors(found, "answers"))
        set_rng(checkpoint.read_tensors(found, "rng"), engine.device)
    facts = {
        **engine.facts(),
        "spec": digest,
        "dataset": spec.dataset.sha256,
        **lesson.facts(),
        **backend.prepare(lesson, model, optimizer, parts, found),
    }
    if spec.model.shape.pads:  # its rows are grouped by their length
        facts["padded"] = True
    if strategy.arithmetic > 1:
        facts["arithmetic"] = strategy.arithmetic
    exact = not found or (state.facts == facts and engine.device.type == "cpu")  # a GPU's sums come in any order
    if found:
        yield from _differences(state.facts, facts)
    state.facts = facts
    job = TrainState(spec, folder, engine, lesson, course, state, backend, began - state.wall_seconds)
    done |= {"recomputed_layers": recompute, "backend": backend.name, **lesson.details()}
    yield started(job, state.step if found else None, exact, done, time.monotonic() - began)
    if rehearsed := course.rehearsed(lesson):
        yield _log(
            "info", "General rows are played in: {general_rows_played}, which are {general_share:.1%} of all tokens.".format(**rehearsed)
        )
    del model, trained, optimizer, backend  # `job` alone holds them, so that it can let go of them

    release(engine.device)  # what was needed so far lies where threads beside each other do not find it
    with distributed.together(engine.device, folder) as job.world:
        yield from _steps(job, control)
    if job.world.first and not control.stopped:
        yield from finish(job)


def _steps(job: TrainState, control: StopSignals) -> Iterator[events.TrainerEvent]:
    """Optimizer steps until the end, until validation no longer improves, or until a stop is asked for and the state is saved."""
    run, state, course, world, backend = job.spec.run, job.state, job.course, job.world, job.backend
    due = course.due(state.step) or bool(state.stop_reason)
    unjudged = state.step > 0 and due and state.evaluated_at != state.step  # a judge was away in this evaluation
    if world.first and (state.evaluated_at < 0 or unjudged):
        yield from kept_if_away(job, evaluate(job))
        if unjudged and (course.saves(state.step) or (run.load_best and state.best_step == state.step)):
            yield save(job)
    world.wait()
    if state.step and state.step == control.pause_at:  # the attempt before died after it had saved this step
        control.stopped = True
        return
    backend.start(world)
    packs = course.packs(job.lesson, course.position(state.step) * run.passes)
    late: deque[tuple[events.Step, AsyncScalars]] = deque()
    unread = depth(job.engine.device)
    job.lap = time.perf_counter()
    before, draws = state.step, job.lesson.draws
    batch = None if draws else (yield from next_batch(job, packs))
    while state.step < course.total_steps and not any(world.agree(job.stopped_early)):
        figures = AsyncScalars(take_step(job, batch or (yield from kept_if_away(job, next_batch(job, packs)))))
        late.append((step_event(job), figures))
        # While a GPU computes this step the next one is laid out, and the figures of the one before are read: it never waits.
        batch = None if draws else (yield from next_batch(job, packs))
        while len(late) > unread:
            yield report(job, *late.popleft())
        told = backend.remarks()
        if world.first:
            yield from (_log("warn", text) for text in told)
        if state.step == before + 2 and (missed := fused_layers.given_up()):
            yield _log(
                "warn", f"The compiler gave up on {missed} pieces of the model; they run as they are. `luthier doctor` may show why."
            )
        # Wishes are only ever added to what was heard: one may come while the others are asked.
        stop, saving = world.agree(control.stop or state.step == control.pause_at, control.save)
        due = course.due(state.step) or bool(state.stop_reason)
        if due or course.saves(state.step) or saving or stop:
            while late:
                yield report(job, *late.popleft())
            with backend.gathered(job.attempt):
                if world.first:
                    if due:
                        yield from kept_if_away(job, evaluate(job))
                    if course.saves(state.step) or saving or stop or (run.load_best and state.best_step == state.step):
                        yield save(job)
            world.wait()
            control.save = False
            if stop and state.step < course.total_steps:
                control.stopped = True
                return
            job.lap = time.perf_counter()
    if world.first and state.stop_reason:
        yield _log("warn", f"Stopped at step {state.step}. {state.stop_reason}")
    backend.close()


# Before the first step ------------------------------------------------------------------------------------------------


def started(job: TrainState, resumed_from: int | None, exact: bool, done: dict[str, Any], seconds: float) -> events.Started:
    lesson, backend = job.lesson, job.backend
    return events.Started(
        device=job.engine.name,
        precision=job.engine.precision,
        total_steps=job.course.total_steps,
        train_rows=len(lesson.train),
        validation_rows=len(lesson.held_out),
        train_tokens=lesson.train.tokens,
        trainable_parameters=sum(p.numel() for p in backend.trained.values()),
        parameters=sum(p.numel() for p in backend.model.parameters()),
        resumed_from=resumed_from,
        exact=exact,
        seconds_to_load=seconds,
        details={
            **job.state.facts,
            "attention": packed_attention.NAME,
            **done,
            "tokens_per_pass": job.course.budget,
            "longest_row": max(lesson.step_rows.lengths),
            **job.course.rehearsed(lesson),
        },
    )


def _differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[events.Log]:
    changed = [f"{key}: {before.get(key)} → {now.get(key)}" for key in {**now, **before} if before.get(key) != now.get(key)]
    if changed:
        yield _log("warn", f"Resumed, but not bit for bit, because something changed ({'; '.join(changed)}).")


def _log(level: str, message: str) -> events.Log:
    return events.Log(level=level, message=message)


# Now and then ---------------------------------------------------------------------------------------------------------


def evaluate(job: TrainState) -> Generator[events.TaskProgress | events.Evaluated | events.Sampled | events.Log]:
    """Score the held-out rows and write the sample answers; remember whether this is the best so far."""
    state, lesson = job.state, job.lesson
    began = time.monotonic()
    validating = lesson.validate(job.model, job.course.budget, job.engine)
    scored = (yield from ProgressReporter("Scoring the validation rows")(validating)) if len(lesson.held_out) else None
    state.evaluated_at = state.step
    if scored is not None:
        best = _remember(job, scored)
        rest = {key: value for key, value in scored.metrics.items() if key != "loss"}
        seconds = time.monotonic() - began
        yield events.Evaluated(step=state.step, loss=scored.metrics["loss"], metrics=rest, best=best, seconds=seconds)
        if scored.faults:
            yield _log("warn", f"{len(scored.faults)} answers at step {state.step} have no grade. {scored.faults[0]}")
    samples = lesson.samples(job.model, state, job.engine)
    if samples:
        yield events.Sampled(step=state.step, samples=samples)


def kept_if_away(job: TrainState, work: Generator[E, None, R]) -> Generator[E | events.Saved, None, R]:
    """`work`; where a grader's model cannot be asked, the state is saved first, so that a resumed job does this work again and no other."""
    try:
        return (yield from work)
    except ModelAway:
        if job.state.step:
            yield save(job)
        raise


def _remember(job: TrainState, scored: EvalResult) -> bool:
    state, loss = job.state, scored.metrics["loss"]
    metric = job.spec.run.metric_for_best
    by_loss = loss if scored.value is None else scored.value
    value = by_loss if metric == "loss" else -(_mean(scored.graded) if metric == "grader" else scored.metrics[job.lesson.accuracy])
    state.curve = [*state.curve, (state.step, loss)]
    state.last, state.last_rows = scored.metrics, scored.rows
    job.lesson.watch_evaluation(state)
    if state.step == 0:
        state.before, state.base_rows = scored.metrics, scored.rows
        return False
    better = clearly_better(state.best_graded, scored.graded) if metric == "grader" else state.best_loss is None or value < state.best_loss
    if state.best_loss is not None and not better:
        state.without_better += 1
        return False
    state.best, state.best_rows, state.best_loss, state.best_step, state.without_better = scored.metrics, scored.rows, value, state.step, 0
    state.best_graded = scored.graded
    state.best_path = relative(job.attempt / f"checkpoint-{state.step}")
    return True


def _mean(scores: list[float | None]) -> float:
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if known else 0.0


def save(job: TrainState) -> events.Saved:
    """Write a checkpoint, and sweep the ones no longer needed."""
    state = job.state
    state.wall_seconds = time.monotonic() - job.began
    trained, optimizer, rng = job.backend.trained, job.backend.optimizer_state(), rng_tensors(job.engine.device)
    answers = job.lesson.kept() if state.step % job.course.updates else {}
    written = checkpoint.save(job.attempt, state, job.model, job.spec.strategy, job.lesson.tokenizer, trained, optimizer, rng, answers)
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


def finish(job: TrainState) -> Iterator[events.Log | events.TaskProgress | events.Finished]:
    """Write the result: the best checkpoint's weights where rows were held out and it is asked for, else the last ones. Then base and result are
    measured on the same rows and texts, one after the other, so that both are never in memory together."""
    state, spec, lesson = job.state, job.spec, job.lesson
    if not spec.run.load_best and state.best_step is not None:
        state.best, state.best_rows, state.best_step = state.last, state.last_rows, state.step
    elif state.best_path and state.best_step != state.step:
        best = get_settings().data_dir / state.best_path
        checkpoint.load_weights(best, job.backend.trained)
        spec.strategy.restore(body_of(job.model), checkpoint.read_tensors(best, "extra"))  # what it settled later fits other weights
        lesson.after_change()
    written, revision, adapter = export(job.attempt, spec, job.model, lesson.tokenizer, state)
    result = spec.model.tuned(spec.strategy.name, relative(written.path), adapter or revision)
    compared = yield from final_evaluation.compare(job, result.model_copy(update={"kind": lesson.kind()}))
    state.wall_seconds = time.monotonic() - job.began
    yield events.Finished(
        reason="completed" if state.step >= job.course.total_steps else "early_stopped",
        why=state.stop_reason,
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
