"""What a task changes in the gradient recipe: which data it reads, its loss, its scores, and what its result is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch

from app import events
from app.graders import Ask, Reply, no_models
from app.spec import JobSpec
from worker.data.batching import Tokenised
from worker.modeling.classifier import Classifier
from worker.modeling.new_tokens import LearnedRows
from worker.modeling.packed_attention import PackShape, frame_for
from worker.runtime.device import Compute
from worker.runtime.distributed import ProcessGroup
from worker.training import optim
from worker.training.checkpoint import State

MAX_LISTED = 5
"""How many of the worst and of the best rows an evaluation lists."""
MAX_REMEMBERED = 5000
"""Rows whose single losses a checkpoint keeps, so that base and tuned can be compared row by row in the end."""


class LossOutput(NamedTuple):
    """What a pass over a pack, or over a part of one, found."""

    loss: torch.Tensor  # the sum of the losses, in nats
    tokens: int
    losses: int
    measured: torch.Tensor | None = None  # sums of what else was measured, still on the device; `name_metrics` reads them later


class EvalResult(NamedTuple):
    """Scores of the held-out rows together, `loss` among them, and the loss of each row alone, in nats."""

    metrics: dict[str, float]
    rows: list[float]
    graded: list[float | None] = []  # noqa: RUF012  # never changed; the first grader's score of each graded row, where the job has graders
    faults: list[str] = []  # noqa: RUF012  # why answers had no score
    value: float | None = None  # what the best checkpoint has least of, where that is not the loss


Loader = Callable[[], torch.nn.Module]
"""Gives the model as it was before tuning; loads it when it is first asked for."""


class TrainingObjective(ABC):
    """One task. Made from an order and its tokenizer, it has read the data; raises BadData when nothing can be learnt."""

    unit: ClassVar[str]  # what one loss is about
    excluded: ClassVar[str] = "rows have nothing left to train on"  # what is said of rows that were skipped
    preparing: ClassVar[str] = "Reading the rows with the base model"  # what `prepare` does
    accuracy: ClassVar[str] = "accuracy"  # which of the scores is the share that it gets right
    draws: ClassVar[bool] = False  # the rows of a step are drawn from the model when the step begins (`draw`, `take`)
    measures: ClassVar[int] = 0  # how many sums `LossOutput.measured` has
    train: Tokenised
    held_out: Tokenised
    played: Tokenised | None = None  # the training rows, and behind them general ones that are played in against forgetting
    labels: list[str] | None = None
    answer: Callable[[Ask], Reply] = staticmethod(no_models)  # asks a model for a grader
    attempt: Path  # the attempt's folder
    learned_rows: Sequence[LearnedRows] = ()  # of new tokens, where the strategy keeps their table frozen
    frames: Sequence[PackShape] = ()  # the shapes of packs on a GPU, the smallest first

    def __init__(self, spec: JobSpec, tokenizer: Any) -> None:
        self.spec, self.tokenizer = spec, tokenizer
        # Placeholders before every sequence, for strategies that learn what stands there.
        self.lead: list[int] = [tokenizer.pad_token_id or 0] * spec.strategy.virtual_tokens()

    @property
    def longest(self) -> int:
        """Tokens of the longest row allowed, placeholders included."""
        return min(self.spec.run.max_length, self.spec.model.shape.positions)

    @property
    def rows_per_pass(self) -> int | None:
        """Rows of a pass, where the objective says so."""
        return None

    @property
    def updates(self) -> int:
        """Steps on the same packs, one after the other."""
        return 1

    @property
    def step_rows(self) -> Tokenised:
        """The rows that packs number."""
        return self.train if self.played is None else self.played

    def facts(self) -> dict[str, Any]:
        """What has to be equal, besides the spec, for a resumed job to be bit-exact; known once `prepare` is done."""
        return {}

    @abstractmethod
    def remarks(self) -> Iterator[str]:
        """What a person should know of the data before training starts."""

    @abstractmethod
    def load(self, engine: Compute) -> torch.nn.Module:
        """The model before tuning, as the strategy attaches to it."""

    @property
    def pack_lengths(self) -> list[int]:
        """Tokens of each of what packs number."""
        return self.step_rows.lengths

    # What takes a pass over many rows is a generator of the shares that are done (worker/runtime/progress.py).

    def prepare(self, model: torch.nn.Module, engine: Compute, attempt: Path, budget: int) -> Generator[float, None, None]:
        """Done once with the model before the strategy is attached, in every attempt, packs having `budget` tokens."""
        yield from ()

    def prepared(self) -> Iterator[str]:
        """What a person should know of what `prepare` found."""
        yield from ()

    def details(self) -> dict[str, Any]:
        """The same for the details of a started job."""
        return {}

    @abstractmethod
    def attach(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model ready to train."""

    @abstractmethod
    def learnt(self, window: Sequence[Sequence[int]]) -> int:
        """Over how many losses a step's packs are averaged."""

    def kept(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps of the rows that were drawn, where further steps learn from them."""
        return {}

    def put_back(self, kept: dict[str, torch.Tensor]) -> None:  # noqa: B027
        """Take up the rows that `kept` gave."""

    def frame_of(self, pack: Sequence[int]) -> PackShape | None:
        """The shape that a pack of training rows is padded to; None where each has its own."""
        return frame_for(self.frames, sum(self.step_rows.lengths[row] for row in pack))

    @abstractmethod
    def batch(self, pack: Sequence[int], engine: Compute) -> Any:
        """What `loss` needs of a pack of training rows, sent to the device; made while the step before still runs."""

    def before_step(  # noqa: B027  # most objectives need nothing
        self, model: torch.nn.Module, batches: Sequence[Sequence[Any]], rows: int, engine: Compute, world: ProcessGroup
    ) -> None:
        """What a step needs to know of all its packs before the loss of any: called in every process with its own packs, each as the
        parts that `batch` made of it, and with the number of losses in all processes."""

    @abstractmethod
    def loss(self, model: torch.nn.Module, batch: Any, engine: Compute) -> LossOutput:
        """One pass over what `batch` made. Parts of a pack may pass side by side in threads, so it changes nothing that they share."""

    def after_change(self) -> None:
        """Called after every change of the trained weights: an optimizer step, or a checkpoint that was read."""
        for rows in self.learned_rows:
            rows.write()

    def name_metrics(self, measured: torch.Tensor) -> dict[str, float]:
        """The figures of a step's event from the sums that its passes measured."""
        return {}

    def watch_step(self, state: State, metrics: dict[str, float]) -> None:  # noqa: B027  # most objectives watch nothing
        """Set the state's `stop_reason` where the metrics of a step say that the job must stop."""

    def watch_evaluation(self, state: State) -> None:  # noqa: B027
        """The same after an evaluation."""

    @abstractmethod
    def validate(self, model: torch.nn.Module, budget: int, engine: Compute) -> Generator[float, None, EvalResult]:
        """Scores of the held-out rows."""

    def base_answers(self, model: torch.nn.Module, engine: Compute) -> list[str]:
        """What the model says to the sample prompts before tuning."""
        return []

    def samples(self, model: torch.nn.Module, state: State, engine: Compute) -> list[events.Sample]:
        """A few held-out rows with what the model says now."""
        return []

    @abstractmethod
    def kind(self) -> str:
        """The kind of the tuned model."""

    # At the end, base and result on the same rows ----------------------------------------------------------------------

    def row_losses(self, model: torch.nn.Module, budget: int, engine: Compute) -> Generator[float, None, list[float]]:
        """The result's mean loss of each training row in nats, for the ledger; empty where a task keeps none."""
        yield from ()
        return []

    def row_losses_before(self, base: Loader, budget: int, engine: Compute) -> Generator[float, None, list[float]]:
        """The same before tuning."""
        yield from ()
        return []

    def writer(self, model: torch.nn.Module) -> torch.nn.Module | None:
        """A model that writes text with the stack of `model`, the base's or the result's; None where there is none."""
        return None

    @abstractmethod
    def examine(self, model: torch.nn.Module, state: State, budget: int, engine: Compute) -> Generator[float, None, Any]:
        """What the evaluation needs of the result, before it leaves the memory."""

    @abstractmethod
    def evaluation(self, state: State, examined: Any, base: Loader, budget: int, engine: Compute) -> dict[str, Any]:
        """Base and result on the same held-out rows; empty without any."""


def body_of(model: torch.nn.Module) -> torch.nn.Module:
    """What the strategy attached to: a classifier's stack, or the model."""
    return model.backbone if isinstance(model, Classifier) else model


def trained_parameters(model: torch.nn.Module) -> optim.Named:
    """What learns, by name. A classifier's stack keeps its own names, so that a checkpoint need not hold it twice."""
    if not isinstance(model, Classifier):
        return optim.trained_parameters(model)
    found = {name: p for name, p in model.backbone.named_parameters() if p.requires_grad}
    return found | {f"{optim.HEAD}{name}": p for name, p in model.head.named_parameters()}


def remarks_on(lesson: TrainingObjective) -> Iterator[str]:
    """What is said of the data of any task."""
    for name, part in (("training", lesson.train), ("validation", lesson.held_out)):
        if part.cut:
            yield f"{part.cut} {name} rows were longer than {lesson.longest} tokens and were cut."
        if part.skipped:
            lines = ", ".join(map(str, part.skipped[:5])) + (", …" if len(part.skipped) > 5 else "")
            yield f"{len(part.skipped)} {name} {lesson.excluded} and were excluded (lines {lines})."
    if not len(lesson.held_out):
        yield "No rows are held out, so the last weights are kept and training does not stop early."
