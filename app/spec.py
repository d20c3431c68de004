"""JobSpec: the immutable specification of a job. Stored with the job, passed to the trainer, shown on the page, copied as YAML."""

from __future__ import annotations

import uuid
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from app.languages import mark
from app.objectives import OBJECTIVES, SETTINGS, Task
from app.older_settings import renamed
from app.optimizers import OPTIMIZERS
from app.run_settings import RunSettings
from app.shapes import Shape
from app.strategies import STRATEGIES, AnyStrategy, Strategy

Kind = Literal["generic", "instruction", "dialogue", "classifier", "encoder", "reward"]
SILENT = {"classifier": mark("a classifier"), "encoder": mark("an encoder"), "reward": mark("a reward model")}
"""Kinds of models that write no text, and what one is called."""


MAX_CLASSES = 5000
"""Maximum labels of a classifier: a column that names every row is no label."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Adapter(_Frozen):
    """One adapter in the lineage from a base to a fine-tuned model. `path` is relative to the data folder. `blend` scales its
    change; below 1 a whole model may be here too, to be interpolated with its base."""

    strategy: str
    path: str
    sha256: str
    blend: float = Field(1.0, ge=0, le=1, exclude_if=lambda share: share == 1)

    @property
    def key(self) -> str:
        """Identifies it among all adapters and blends."""
        return self.sha256 if self.blend == 1 else f"{self.sha256 or self.path}@{self.blend:g}"


class ModelRef(_Frozen):
    """The weights of a model. `path` is the folder of the base's weights and tokenizer, relative to the data folder; `adapters`
    are attached to it in order (none for a whole model). `revision` is the SHA-256 over the files of `path`."""

    id: uuid.UUID
    name: str
    kind: Kind
    path: str
    revision: str
    adapters: tuple[Adapter, ...] = ()
    shape: Shape
    labels: tuple[str, ...] | None = None

    def tuned(self, strategy: str, path: str, sha256: str) -> ModelRef:
        """What training made of this model, at `path`: this one with an adapter, or a whole model."""
        if STRATEGIES[strategy].adapter:
            return self.model_copy(update={"adapters": (*self.adapters, Adapter(strategy=strategy, path=path, sha256=sha256))})
        return self.model_copy(update={"path": path, "revision": sha256, "adapters": ()})


class DatasetRef(_Frozen):
    """The rows of a dataset: a Parquet file with the columns `line` and `row`, relative to the data folder."""

    id: uuid.UUID
    name: str
    path: str
    sha256: str
    format: str
    rows: int


class Split(_Frozen):
    """How rows are held out when there is no validation file; how many, and the seed, are in the run settings."""

    method: Literal["random", "stratified", "grouped"] = Field(
        "random", description="At random; every label in its share; or whole groups of a column at a time."
    )
    column: str | None = Field(None, max_length=200, description="The column whose values are the groups, or the labels.")
    seed: int | None = Field(
        None,
        ge=0,
        le=2**31 - 1,
        description="Seed of the split alone, for runs with other seeds on the same validation rows. Empty takes the run's.",
        exclude_if=lambda seed: seed is None,
    )

    def seeded(self, seed: int) -> int:
        """The seed that decides the split of a run with this one."""
        return seed if self.seed is None else self.seed


class AskedModel(_Frozen):
    """A model that graders of a job ask, by its name there, as it was when the job was created. An empty name is the encoder of the project."""

    name: str
    model: ModelRef


class JobSpec(_Frozen):
    """Everything a trainer needs to know; two equal specs on one machine give equal weights."""

    version: Literal[1] = 1
    name: str
    task: Task
    model: ModelRef
    dataset: DatasetRef
    validation: DatasetRef | None = None
    split: Split | None = Field(None, exclude_if=lambda split: split is None)
    run: RunSettings
    strategy: AnyStrategy
    preference: SETTINGS | None = Field(None, exclude_if=lambda settings: settings is None)
    graders: tuple[dict[str, Any], ...] = Field((), exclude_if=lambda graders: not graders)  # as app.graders.to_json writes them
    judges: tuple[AskedModel, ...] = Field((), exclude_if=lambda judges: not judges)  # the models that graders and reward ask
    teacher: ModelRef | None = Field(None, exclude_if=lambda teacher: teacher is None)  # the model that is distilled

    @model_validator(mode="before")
    @classmethod
    def _stored(cls, given: Any) -> Any:
        """A spec as an older studio stored it, with the settings of its objective read as that objective's."""
        if not isinstance(given, dict):
            return given
        if isinstance(given.get("run"), dict):
            given = {**given, "run": renamed(given["run"])}
        entry = OBJECTIVES.get(str(given.get("task")))
        if entry and entry.settings and isinstance(given.get("preference"), dict):
            given = {**given, "preference": entry.settings.model_validate(given["preference"])}
        return given

    @property
    def split_seed(self) -> int:
        """The seed that decides which rows are held out."""
        return self.split.seeded(self.run.seed) if self.split else self.run.seed

    @property
    def learning_rate(self) -> float:
        """The maximum learning rate of the job: as configured, or the strategy's default for the task and the optimizer."""
        return self.run.learning_rate or usual_learning_rate(self.strategy, self.task, self.run.optimizer)


def usual_learning_rate(strategy: Strategy | type[Strategy], task: str, optimizer: str = "adamw") -> float:
    """The default learning rate."""
    own = strategy.rate_factor() if isinstance(strategy, Strategy) else 1.0
    return strategy.learning_rate_for(task) * own * OPTIMIZERS.get(optimizer, OPTIMIZERS["adamw"]).rate
