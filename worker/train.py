"""The gradient recipe, top to bottom: an order goes in, events come out.

    list(train(spec, folder))

is a whole job, with no database, queue or process around it.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from app import events
from app.errors import BadData, StudioError
from app.estimate import operations_per_token, recomputed_layers, speed_of
from app.forgetting import TextScore
from app.machine import this_machine
from app.settings import get_settings
from app.spec import JobSpec, RunSettings
from worker import attention, batches, checkpoint, evaluate, forgetting, kernels, ledger, optim, processes
from worker.batches import Tokenised, make_batch
from worker.checkpoint import State, relative
from worker.device import Engine, choose, peak_memory, rng_tensors, set_rng
from worker.evaluate import Question
from worker.export import export
from worker.load import load_plain, load_tokenizer
from worker.loss import head_of, linear_cross_entropy
from worker.pack import plan, stream
from worker.prompts import prepare_tokenizer, tuned_kind

if TYPE_CHECKING:
    from worker.preference import Preferring

MOST_NOT_FINITE = 3
SPEED_WINDOW = 20


@dataclass
class Control:
    """What others ask of a running job; looked at after every optimizer step."""

    stop: bool = False
    save: bool = False


class Diverged(StudioError):
    """Loss or gradient was not finite several times in a row."""

    code = "diverged"


@dataclass
class Data:
    train: Tokenised
    held_out: Tokenised
    questions: list[Question]
    budget: int  # tokens of a pass
    packs_per_epoch: int
    total_steps: int
    evaluate_every: int  # steps; total_steps when only the end is evaluated
    lesson: Preferring | None = None  # what learning preferences changes
    frame: attention.Frame | None = None  # the one shape of all packs, on a GPU

    @property
    def most(self) -> int | None:
        """Rows that a pack holds at most."""
        return self.frame.most() if self.frame else None

    def due(self, step: int) -> bool:
        return step == self.total_steps or step % self.evaluate_every == 0


@dataclass
class Trainee:
    """Everything that lives while a job trains."""

    spec: JobSpec
    attempt: Path
    engine: Engine
    tokenizer: Any
    model: torch.nn.Module
    trained: optim.Named
    optimizer: torch.optim.Optimizer
    data: Data
    lead: list[int]  # placeholders before every sequence, for strategies that learn what stands there
    state: State
    began: float  # monotonic, for the seconds of everything
    pace: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=SPEED_WINDOW))
    lap: float = 0.0
    world: processes.World = field(default_factory=processes.World)

    @property
    def stopped_early(self) -> bool:
        patience = self.spec.run.early_stopping_patience
        return bool(patience) and self.state.without_better >= patience


def train(spec: JobSpec, folder: Path, runs: Path | None = None, control: Control | None = None) -> Iterator[events.TrainerEvent]:
    """Tune `spec.model` and say what happens; the result is written under `folder`, an attempt's folder.

    Goes on from the newest whole checkpoint under `runs` (by default the folder's parent). Ends after `Finished`, or without
    it when `control.stop` was set and the state was saved. Raises BadData, BadModel, DoesNotFit, Diverged, or what torch raises.
    """
    control = control or Control()
    began = time.monotonic()
    digest = spec_digest(spec)
    spec = processes.spread(spec)
    run, strategy = spec.run, spec.strategy
    if spec.task == "classification" or type(strategy).recipe != "gradient":
        raise BadData(f"{strategy.title} for the task {spec.task} is not learnt by this recipe.", way_out="Choose the task generation.")
    found = checkpoint.newest(runs or folder.parent)
    state = checkpoint.read_state(found) if found else State()

    torch.manual_seed(run.seed)
    engine = choose(run, strategy, state.facts)
    if engine.device.type == "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)

    tokenizer = load_tokenizer(spec.model)
    plain_template = prepare_tokenizer(tokenizer)
    lead = [tokenizer.pad_token_id] * strategy.virtual_tokens()
    data = read_data(spec, tokenizer, lead, engine)
    yield from _remarks(data, spec, plain_template)

    model = load_plain(spec.model, engine.frozen, attention.NAME, str(engine.device), type(strategy).base_bits)
    kernels.use_fused_norms(model)
    remembered: list[TextScore] = []
    if run.forgetting and processes.size() == 1:
        yield _log("info", "Scoring general texts, to see in the end what was forgotten.")
        remembered = forgetting.before(spec, model, tokenizer, data.budget, engine)
    if not found and data.questions:
        yield _log("info", f"Writing what {spec.model.name} answers before tuning.")
        state.base_answers = evaluate.answers(model, tokenizer, data.questions, run.sample_tokens, engine)
    if data.lesson:
        data.lesson.prepare(model, engine, folder, data.budget)
    recompute = recomputed_layers(spec.model.shape, strategy, run, max(data.train.lengths), this_machine())
    recompute = kernels.recompute_layers(model, recompute)
    model = strategy.attach(model, task=spec.task).train()
    done = kernels.speed_up(model, engine, 0.0 if data.lesson else seconds_expected(spec, data))  # packs of pairs have many shapes
    trained = optim.trained_parameters(model)
    optimizer = optim.make_optimizer(trained, peak_rate(spec), run.weight_decay, run.optimizer)

    strategy.begin(model, data.total_steps)

    facts = {**engine.facts(), "spec": digest, "dataset": spec.dataset.sha256}
    exact = not found or state.facts == facts
    if found:
        checkpoint.load_weights(found, trained)
        optim.load_state(optimizer, trained, checkpoint.read_tensors(found, "optimizer"))
        strategy.restore(model, checkpoint.read_tensors(found, "extra"))
        set_rng(checkpoint.read_tensors(found, "rng"), engine.device)
        yield from _differences(state.facts, facts)
    state.facts = facts
    job = Trainee(spec, folder, engine, tokenizer, model, trained, optimizer, data, lead, state, began - state.wall_seconds)
    yield started(job, state.step if found else None, exact, {**done, "recomputed_layers": recompute}, time.monotonic() - began)
    del found

    with processes.together(engine.device) as job.world:
        yield from _steps(job, control)
    if job.world.first and not (control.stop and state.step < data.total_steps):
        yield finish(job, remembered)


def _steps(job: Trainee, control: Control) -> Iterator[events.TrainerEvent]:
    """Optimizer steps until the end, until validation no longer improves, or until a stop is asked for and the state is saved."""
    run, state, data, engine, world = job.spec.run, job.state, job.data, job.engine, job.world
    world.even(job.trained.values())
    if world.first:
        if state.evaluated_at < 0:
            yield from judge(job)
        ledger.before(job)
    packs = stream(data.train.lengths, data.budget, seed=run.seed, start=state.step * run.accumulation, most=data.most)
    late: list[tuple[events.Step, torch.Tensor, torch.Tensor, torch.Tensor | None]] = []
    job.lap = time.perf_counter()
    while state.step < data.total_steps and not any(world.agree(job.stopped_early)):
        window = [rows for _, _, rows in itertools.islice(packs, run.accumulation)]
        loss, norm = take_step(job, window)
        measured = data.lesson.step_metrics() if data.lesson else None
        if measured is not None:
            world.sum_([measured])
        late.append((_step_event(job, window), loss, norm, measured))
        # On a GPU a step's figures are read while the next one runs, so that the device never waits for us.
        while len(late) > (engine.device.type == "cuda"):
            yield report(job, *late.pop(0))
        control.stop, control.save = world.agree(control.stop, control.save)
        if data.due(state.step) or control.save or control.stop:
            while late:
                yield report(job, *late.pop(0))
            if world.first:
                if data.due(state.step):
                    yield from judge(job)
                yield save(job)
            control.save = False
            if control.stop and state.step < data.total_steps:
                return
            job.lap = time.perf_counter()


# Before the first step ------------------------------------------------------------------------------------------------


def read_data(spec: JobSpec, tokenizer: Any, lead: list[int], engine: Engine) -> Data:
    """Rows split, rendered once, and counted. Raises BadData when nothing is left to learn."""
    run, kind = spec.run, spec.model.kind
    if spec.task == "preference":
        from worker.preference import Preferring

        lesson = Preferring(spec, tokenizer)
        return _counted(run, lesson.train, lesson.held_out, lesson.questions, lesson=lesson)
    rows = batches.read_rows(spec.dataset)
    if spec.validation:
        train_rows, held_rows = rows, batches.read_rows(spec.validation)
    else:
        train_rows, held_rows = batches.split(rows, run.validation_fraction, run.seed, spec.split)
    longest = min(run.max_length, spec.model.shape.positions)
    train_data = batches.tokenise(tokenizer, train_rows, kind, longest, lead)
    held_out = batches.tokenise(tokenizer, held_rows, kind, longest, lead)
    if not len(train_data):
        raise BadData(
            f"None of the {len(train_rows)} rows has an answer to learn within {longest} tokens.",
            way_out="Raise the longest length, or check that the rows have assistant turns with weight 1.",
        )
    room = spec.model.shape.positions - run.sample_tokens - len(lead)
    asked = evaluate.questions(tokenizer, held_rows, kind, run.samples, room)
    return _counted(run, train_data, held_out, asked, framed=engine.framed)


def _counted(
    run: RunSettings,
    train_data: Tokenised,
    held_out: Tokenised,
    asked: list[Question],
    *,
    framed: bool = False,
    lesson: Preferring | None = None,
) -> Data:
    """The data with its packs and steps counted."""
    budget = math.ceil(run.max_tokens_per_step / run.accumulation)
    frame = attention.frame_of(train_data.lengths, budget) if framed else None
    packs = len(plan(train_data.lengths, budget, seed=run.seed, epoch=0, most=frame and frame.most()))
    total = max(1, math.ceil(run.epochs * packs / run.accumulation))
    total = min(total, run.max_steps or total)
    every = max(1, round(packs / run.accumulation / run.evaluations_per_epoch)) if run.evaluations_per_epoch else total
    return Data(train_data, held_out, asked, budget, packs, total, every, lesson, frame)


def seconds_expected(spec: JobSpec, data: Data) -> float:
    """How long the training steps will take here, from past speeds or a cautious guess."""
    work = operations_per_token(spec.model.shape, spec.strategy, 1.0)
    return data.total_steps * spec.run.max_tokens_per_step * work / speed_of(spec, this_machine())


def peak_rate(spec: JobSpec) -> float:
    return spec.run.learning_rate or type(spec.strategy).default_learning_rate


def spec_digest(spec: JobSpec) -> str:
    return hashlib.sha256(spec.model_dump_json().encode()).hexdigest()


def started(job: Trainee, resumed_from: int | None, exact: bool, done: dict[str, Any], seconds: float) -> events.Started:
    data, model = job.data, job.model
    return events.Started(
        device=job.engine.name,
        precision=job.engine.precision,
        total_steps=data.total_steps,
        train_rows=len(data.train),
        validation_rows=len(data.held_out),
        train_tokens=data.train.tokens,
        trainable_parameters=sum(p.numel() for p in job.trained.values()),
        parameters=sum(p.numel() for p in model.parameters()),
        resumed_from=resumed_from,
        exact=exact,
        seconds_to_load=seconds,
        details={**job.state.facts, "attention": attention.NAME, **done, "tokens_per_pass": data.budget},
    )


def _remarks(data: Data, spec: JobSpec, plain_template: bool) -> Iterator[events.Log]:
    """What a person should know of the data before training starts."""
    if data.lesson:
        yield from (_log("warn", text) for text in data.lesson.remarks())
        return
    for name, part in (("training", data.train), ("validation", data.held_out)):
        if part.cut:
            yield _log("warn", f"{part.cut} {name} rows were longer than {spec.run.max_length} tokens and were cut.")
        if part.skipped:
            lines = ", ".join(map(str, part.skipped[:5])) + (", …" if len(part.skipped) > 5 else "")
            yield _log("warn", f"{len(part.skipped)} {name} rows have no answer left to learn and were left out (lines {lines}).")
    if not len(data.held_out):
        yield _log("warn", "No rows are held out, so the last weights are kept and training does not stop early.")
    if plain_template and spec.dataset.format in ("chat", "instruction"):
        yield _log("info", "The model has no chat template; it learns a plain one, which is saved with the result.")


def _differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[events.Log]:
    changed = [f"{key}: {before.get(key)} → {value}" for key, value in now.items() if before.get(key) != value]
    if changed:
        yield _log("warn", f"Resumed, but not bit for bit, because something changed ({'; '.join(changed)}).")


def _log(level: str, message: str) -> events.Log:
    return events.Log(level=level, message=message)


# One step -------------------------------------------------------------------------------------------------------------


def take_step(job: Trainee, window: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step over the packs of `window`. Returns loss (nats per trained token) and gradient length, still on the device."""
    run, state, engine = job.spec.run, job.state, job.engine
    lesson = job.data.lesson
    learnt = lesson.learnt(window) if lesson else batches.trained_in(job.data.train, window)
    head = head_of(evaluate.plain_model(job.model))
    total = torch.zeros((), device=engine.device)
    tokens_here, trained_here = 0, 0
    for pack in job.world.share(window):
        if lesson:
            loss, tokens, trained = lesson.loss(job.model, pack, engine)
        else:
            batch = make_batch(job.data.train, pack, engine.device, job.data.frame)
            hidden = evaluate.hidden_states(job.model, batch, engine)
            loss, tokens, trained = linear_cross_entropy(hidden, head, batch.targets, engine.compute), batch.tokens, batch.trained
        loss = loss / learnt
        loss.backward()
        total += loss.detach()
        tokens_here, trained_here = tokens_here + tokens, trained_here + trained
    job.world.sum_gradients(job.trained.values())
    job.world.sum_([total])
    tokens, trained = job.world.count(tokens_here, trained_here)
    state.step, state.tokens, state.trained_tokens = state.step + 1, state.tokens + tokens, state.trained_tokens + trained
    extra = job.spec.strategy.regulariser(job.model)
    if extra is not None:
        extra.backward()
    norm = optim.clip(job.trained, run.max_grad_norm)
    rate = optim.rate(state.step, job.data.total_steps, peak_rate(job.spec), run.schedule, run.warmup_fraction)
    optim.set_rate(job.optimizer, rate)
    optim.skip_if_not_finite(job.optimizer, norm + total)
    job.optimizer.step()
    job.spec.strategy.after_step(job.model, state.step)
    job.optimizer.zero_grad(set_to_none=True)
    return total, norm


def _step_event(job: Trainee, window: list[list[int]]) -> events.Step:
    """The step as far as it is known without waiting for the device."""
    state = job.state
    return events.Step(
        step=state.step,
        epoch=round(state.step * job.spec.run.accumulation / job.data.packs_per_epoch, 4),
        loss=0.0,
        learning_rate=job.optimizer.param_groups[0]["lr"],
        grad_norm=0.0,
        tokens=state.tokens,
        trained_tokens=state.trained_tokens,
        tokens_per_second=0.0,
        memory_bytes=0,
        seconds=0.0,
    )


def report(job: Trainee, step: events.Step, loss: torch.Tensor, norm: torch.Tensor, measured: torch.Tensor | None = None) -> events.Step:
    """The finished event of a step. Raises Diverged after several steps in a row without a finite loss."""
    state = job.state
    loss_value, norm_value = float(loss), float(norm)
    now = time.perf_counter()
    state.seconds += now - job.lap
    job.lap = now
    job.pace.append((step.tokens, state.seconds))
    state.not_finite = 0 if math.isfinite(loss_value) and math.isfinite(norm_value) else state.not_finite + 1
    if state.not_finite >= MOST_NOT_FINITE:
        raise Diverged(
            f"The loss was not a finite number in {MOST_NOT_FINITE} steps in a row, the last being step {step.step}.",
            way_out=f"Lower the learning rate to {peak_rate(job.spec) / 10:.1g}, or raise the warm-up.",
        )
    return step.model_copy(
        update={
            "loss": loss_value,
            "metrics": job.data.lesson.name_metrics(measured) if job.data.lesson and measured is not None else {},
            "grad_norm": norm_value,
            "tokens_per_second": _speed(job),
            "memory_bytes": peak_memory(job.engine.device),
            "seconds": state.seconds,
        }
    )


def _speed(job: Trainee) -> float:
    """Tokens per second over the last steps of this attempt, evaluations left out."""
    (tokens, seconds), (last_tokens, last_seconds) = job.pace[0], job.pace[-1]
    if last_seconds > seconds:
        return (last_tokens - tokens) / (last_seconds - seconds)
    return job.state.tokens / job.state.seconds if job.state.seconds else 0.0


# Now and then ---------------------------------------------------------------------------------------------------------


def judge(job: Trainee) -> Iterator[events.Evaluated | events.Sampled]:
    """Score the held-out rows and write the sample answers; remember whether this is the best so far."""
    state, data, run = job.state, job.data, job.spec.run
    state.evaluated_at = state.step
    if len(data.held_out):
        began = time.monotonic()
        if data.lesson:
            metrics = data.lesson.validate(job.model, data.budget, job.engine).metrics
        else:
            metrics = evaluate.validate(job.model, data.held_out, data.budget, job.engine)
        best = _remember(job, metrics)
        rest = {key: value for key, value in metrics.items() if key != "loss"}
        seconds = time.monotonic() - began
        yield events.Evaluated(step=state.step, loss=metrics["loss"], metrics=rest, best=best, seconds=seconds)
    if data.questions:
        told = state.base_answers
        if state.step:
            told = evaluate.answers(job.model, job.tokenizer, data.questions, run.sample_tokens, job.engine, job.lead)
        samples = [
            events.Sample(prompt=q.text, reference=q.reference, base=base, answer=answer)
            for q, base, answer in zip(data.questions, state.base_answers, told, strict=True)
        ]
        yield events.Sampled(step=state.step, samples=samples)


def _remember(job: Trainee, metrics: dict[str, float]) -> bool:
    state = job.state
    state.last = metrics
    if state.step == 0:
        state.before = metrics
        return False
    if state.best_loss is not None and not metrics["loss"] < state.best_loss:
        state.without_better += 1
        return False
    state.best, state.best_loss, state.best_step, state.without_better = metrics, metrics["loss"], state.step, 0
    state.best_path = relative(job.attempt / f"checkpoint-{state.step}")
    return True


def save(job: Trainee) -> events.Saved:
    """Write a checkpoint, and sweep the ones no longer needed."""
    state = job.state
    state.wall_seconds = time.monotonic() - job.began
    tensors = optim.state_tensors(job.optimizer, job.trained)
    rng = rng_tensors(job.engine.device)
    written = checkpoint.save(job.attempt, state, job.model, job.spec.strategy, job.tokenizer, job.trained, tensors, rng)
    checkpoint.prune(job.attempt, get_settings().keep_checkpoints, state.best_path)
    return events.Saved(
        step=state.step,
        path=relative(written.path),
        bytes=written.bytes,
        manifest_sha256=written.manifest_sha256,
        metrics=state.last if state.evaluated_at == state.step else {},
        best=state.best_step == state.step,
    )


def finish(job: Trainee, remembered: list[TextScore]) -> events.Finished:
    """Write the result: the best checkpoint's weights where rows were held out, else the last ones. `remembered` are the
    scores of general texts before tuning, where they were taken."""
    state, spec = job.state, job.spec
    steps = state.step
    if state.best_path and state.best_step != steps:
        checkpoint.load_weights(get_settings().data_dir / state.best_path, job.trained)
    ledger.after(job)
    lost = None
    if remembered:
        lost = forgetting.after(spec, job.model, job.tokenizer, job.lead, job.data.budget, job.engine, remembered)
    written, revision, adapter = export(job.attempt, spec, job.model, job.tokenizer, state)
    state.wall_seconds = time.monotonic() - job.began
    measured = events.Measured(
        peak_memory_bytes=peak_memory(job.engine.device),
        seconds=state.wall_seconds,
        tokens_per_second=state.tokens / state.seconds if state.seconds else 0.0,
        tokens=state.tokens,
        trained_tokens=state.trained_tokens,
        steps=steps,
        device=job.engine.name,
    )
    return events.Finished(
        reason="completed" if steps >= job.data.total_steps else "early_stopped",
        step=steps,
        path=relative(written.path),
        bytes=written.bytes,
        revision=revision,
        adapter_sha256=adapter,
        kind=tuned_kind(spec.model.kind, spec.dataset.format),
        best_step=state.best_step,
        labels=list(spec.model.labels) if spec.model.labels else None,
        measured=measured,
        forgetting=lost,
        evaluation={"rows": len(job.data.held_out), "base": state.before, "tuned": state.best} if state.best else {},
    )
