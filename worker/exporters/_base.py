"""What an exporter is: a name, a title, types, and a function that writes a folder."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict

from app.export_formats import PART, ExportFormat, ModelFacts

Progress = Callable[[float, str], None]
"""`progress(share, stage)`: how much is done, from 0 to 1, and what is being done, in words."""


@contextmanager
def completed(path: Path) -> Iterator[Path]:
    """A path to write to that becomes `path` when the block ends, so that a file of that name is complete, and one that was interrupted is
    written again and the others are not."""
    part = path.with_name(path.name + PART)
    yield part
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)


class ExportOptions(BaseModel):
    """What a person chose, and what the files say of the model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    title: str = ""
    types: tuple[str, ...]
    license: str | None = None
    base: str | None = None
    system: str = ""
    base_folder: str = ""
    """The folder of the weights that an adapter lies on."""
    importance: str = ""
    """A .npz file with the importance matrix of `_importance.measure`, or empty."""
    generates: bool = True
    """Whether it writes text: an encoder and a classifier do not."""


class WrittenFile(NamedTuple):
    """One file that was written. `notes` say where it differs from what its type promises."""

    name: str
    type: str
    notes: tuple[str, ...] = ()


class ExportedModel(NamedTuple):
    """What is run to compare an export with its model: a GGUF file with an adapter on it, or a folder for transformers."""

    file: Path
    lora: Path | None = None


class Exporter(ABC):
    """Writes one format. Its name, title and types are those of `app.export_formats`."""

    format: ExportFormat
    program: ClassVar[str] = "llama.cpp"
    """What its files are run in to compare them."""

    @property
    def name(self) -> str:
        return self.format.name

    @property
    def title(self) -> str:
        return self.format.title

    @property
    def types(self) -> tuple[str, ...]:
        return self.format.types

    def accepts(self, facts: ModelFacts) -> str | None:
        """None, or why a model cannot be written: a sentence."""
        return self.format.accepts(facts)

    @abstractmethod
    def write(self, source: Path, into: Path, options: ExportOptions, progress: Progress) -> Sequence[WrittenFile]:
        """Write the model in the folder `source` to files in the existing folder `into`. Files that are there are of an attempt that was
        interrupted, and complete. Raises StudioError where it cannot be done."""

    def run(self, into: Path, one: WrittenFile, work: Path, options: ExportOptions) -> ExportedModel | None:
        """What is run to compare a written file with the model; None for a file that nothing can be compared with."""
        return ExportedModel(into / one.name) if one.name.endswith(".gguf") else None
