"""What every backend does, and the plain one: autograd, torch's clipping and the optimizer's step, one pass after the other."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch

from worker.runtime.device import Compute
from worker.runtime.distributed import Laps, ProcessGroup
from worker.training import checkpoint, optim
from worker.training.objectives._base import LossOutput, TrainingObjective, trained_parameters


class StepBatch(NamedTuple):
    """What one optimizer step reads."""

    learnt: int  # over how many losses the step is averaged, in all processes
    batches: list[list[Any]]  # by pack, this process's own: what the objective made of each part of it


class StepSums(NamedTuple):
    """What the passes of a step found, in all processes."""

    loss: torch.Tensor  # nats per trained token, still on the device
    measured: list[torch.Tensor]  # sums of what else the objective measures, one tensor or none
    tokens: int
    losses: int


class StepBackend(ABC):
    """Computes the steps of a job: `prepare` once, `start` when its processes are connected, then for every step `backward`, `grad_norm`,
    `step` and `zero_grad`, and `close` when no step follows. It holds what moves: `model`, `trained` (by name) and `optimizer`.
    """

    name: ClassVar[str]
    in_parts: ClassVar[bool] = False  # whether it takes packs in parts, a thread each
    max_not_finite: ClassVar[int] = 3  # steps in a row without a finite loss or norm, after which a job is given up

    lesson: TrainingObjective
    model: torch.nn.Module
    trained: optim.Named
    optimizer: torch.optim.Optimizer
    parts: int  # of a pack

    def __init__(self, engine: Compute) -> None:
        self.engine, self.world = engine, ProcessGroup()
        self.laps = Laps(self.world, engine.device)

    @abstractmethod
    def prepare(
        self, lesson: TrainingObjective, model: torch.nn.Module, optimizer: torch.optim.Optimizer, parts: int, saved: Path | None = None
    ) -> dict[str, Any]:
        """Take over a model that is ready to train and its optimizer, whose state is read from the checkpoint `saved`. Returns facts
        that have to be equal for a resumed job to be bit-exact."""

    @abstractmethod
    def start(self, world: ProcessGroup) -> None:
        """Called in every process of the job before the first step."""

    @abstractmethod
    def backward(self, batch: StepBatch) -> StepSums:
        """Add the gradients of a step's packs, those of all processes."""

    @abstractmethod
    def add_loss(self, extra: torch.Tensor) -> None:
        """Add the gradients of a term of the loss that is no pack's, a scalar."""

    @abstractmethod
    def grad_norm(self) -> torch.Tensor:
        """The norm of the whole gradient, on the device."""

    @abstractmethod
    def step(self, learning_rate: float, max_norm: float) -> None:
        """Clip the gradient to `max_norm` (0: not at all) and move the weights; not where the loss or the norm is not finite."""

    @abstractmethod
    def zero_grad(self) -> None:
        """Forget the gradients."""

    def remarks(self) -> list[str]:
        """What a person should know of the steps so far, each said once. Called after every step, in every process."""
        slow = self.laps.slow()
        return [slow] if slow else []

    @abstractmethod
    def gathered(self, folder: Path) -> contextlib.AbstractContextManager[None]:
        """While inside, the first process holds the whole model, to be scored and saved. Every process enters. Files that are needed
        on the way are put into `folder`."""

    @abstractmethod
    def optimizer_state(self) -> dict[str, torch.Tensor] | list[Path]:
        """What a checkpoint keeps of the optimizer: tensors, or files that hold them."""

    @abstractmethod
    def close(self) -> None:
        """Let go of what only steps need; the first process then holds the whole trained model."""


class PlainBackend(StepBackend):
    """The reference: what it computes is right by reading it, and the others are tested against it."""

    name = "plain"

    def prepare(
        self, lesson: TrainingObjective, model: torch.nn.Module, optimizer: torch.optim.Optimizer, parts: int, saved: Path | None = None
    ) -> dict[str, Any]:
        self.lesson, self.model, self.optimizer, self.parts = lesson, model, optimizer, parts
        self.trained = trained_parameters(model)
        if saved:
            self.restore(checkpoint.read_optimizer(saved))
        return {"parts": parts}

    def restore(self, saved: dict[str, torch.Tensor]) -> None:
        """Put back what `optimizer_state` gave."""
        optim.load_state(self.optimizer, self.trained, saved)

    def start(self, world: ProcessGroup) -> None:
        self.world, self.laps = world, Laps(world, self.engine.device)
        world.broadcast(self.trained.values())

    def backward(self, batch: StepBatch) -> StepSums:
        device, measures = self.engine.device, self.lesson.measures
        self.loss = torch.zeros((), device=device)
        measured = [torch.zeros(measures, dtype=torch.float64, device=device)] if measures else []
        tokens, losses = 0, 0
        began = self.laps.now()
        for pack in batch.batches:
            for found in self.passes(pack, batch.learnt):
                self.loss += found.loss
                tokens, losses = tokens + found.tokens, losses + found.losses
                if measured and found.measured is not None:
                    measured[0] += found.measured
        self.laps.note(began)
        self.sum_gradients()
        self.world.sum_([self.loss, *measured])
        return StepSums(self.loss, measured, *self.world.count(tokens, losses))

    def passes(self, pack: Sequence[Any], learnt: int) -> list[LossOutput]:
        """The parts of a pack forwards and backwards, each loss as its share of the step's."""
        found = []
        for part in pack:
            output = self.lesson.loss(self.model, part, self.engine)
            loss = output.loss / learnt
            self.differentiate(loss)
            found.append(output._replace(loss=loss.detach()))
        return found

    def differentiate(self, loss: torch.Tensor) -> None:
        """Add the gradients of a part's share of the loss."""
        loss.backward()

    def sum_gradients(self) -> None:
        """Add the gradients of all processes."""
        self.world.sum_gradients(self.trained.values())

    def add_loss(self, extra: torch.Tensor) -> None:
        extra.backward()

    def grad_norm(self) -> torch.Tensor:
        self.norm = optim.grad_norm(self.trained)
        return self.norm

    def step(self, learning_rate: float, max_norm: float) -> None:
        optim.set_rate(self.optimizer, learning_rate)
        optim.clip_grad_(self.trained, max_norm, self.norm)
        optim.optimizer_step(self.optimizer, self.norm + self.loss)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    @contextlib.contextmanager
    def gathered(self, folder: Path) -> Iterator[None]:
        yield

    def optimizer_state(self) -> dict[str, torch.Tensor] | list[Path]:
        return optim.state_tensors(self.optimizer, self.trained)

    def close(self) -> None:
        del self.optimizer
