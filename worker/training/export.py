"""The result of a job: a folder that the studio serves and that loads elsewhere with peft or transformers alone."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from app import formats
from app.kit import manifest
from app.models.model_card import AppliedAdapter, Provenance, load_code, requirements
from app.objectives import OBJECTIVES
from app.run_settings import RunSettings
from app.spec import Adapter, JobSpec
from app.strategies._files import NEW_TOKENS
from worker.modeling.classifier import Classifier
from worker.modeling.loading import folder_of, load_strategy
from worker.training.checkpoint import State, WrittenCheckpoint, write_folder, write_weights

FINAL = "final"


def export(attempt: Path, spec: JobSpec, model: torch.nn.Module, tokenizer: Any, state: State) -> tuple[WrittenCheckpoint, str, str | None]:
    """Write `final/` in the attempt's folder. Returns it with its revision and, for an adapter, the SHA-256 of its weights
    (over the SHA-256 of each file, in the order of their names, where there are several)."""

    def fill(folder: Path) -> None:
        write_weights(folder, model, spec.strategy, tokenizer)
        labels = len(model.labels) if isinstance(model, Classifier) else 0
        (folder / "README.md").write_text(card(spec, state, labels), encoding="utf-8")

    written = write_folder(attempt / FINAL, fill, step=state.step, base=spec.model.name, base_revision=spec.model.revision)
    made = manifest.read(written.path)
    assert made is not None
    weights = sorted(name for name in made["files"] if name.endswith(".safetensors"))
    digests = [made["files"][name]["sha256"] for name in weights]
    adapter = None
    if type(spec.strategy).adapter and digests:  # a classifier's head is a file of its own
        adapter = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    return written, made["revision"], adapter


def card(spec: JobSpec, state: State, labels: int = 0) -> str:
    """The model card: what it is, how it was made, how to load it. `labels` is how many a classifier has."""
    strategy, run = spec.strategy, spec.run
    settings = "\n".join(f"| {key} | {value} |" for key, value in strategy.model_dump().items() if key != "name")
    scores = "".join(f"| {key} | {state.before[key]:.4f} | {state.best[key]:.4f} |\n" for key in state.before if key in state.best)
    table = f"\n## On validation rows\n\n| | before | after |\n|---|---:|---:|\n{scores}" if scores else ""
    added = f"\n| new tokens | {len(run.new_tokens)} |" if run.new_tokens else ""
    kind = OBJECTIVES[spec.task].result_kind or formats.get(spec.dataset.format).tuned_kind(spec.model.kind)
    code = load_code(kind, made_of(spec, labels))
    return f"""---
base_model: {spec.model.name}
library_name: {"peft" if "import PeftModel" in code else "transformers"}
tags: [luthier, {strategy.name}]
---
# {spec.name}

{spec.model.name} fine-tuned by {strategy.title} on the dataset “{spec.dataset.name}” ({spec.dataset.rows} rows) with Luthier.

## How it was made

| setting | value |
|---|---|
| strategy | {strategy.title} |
{settings}
| optimizer steps | {state.best_step or state.step} |
| batch | {_batch(run)} |
| learning rate | {spec.learning_rate} |
| optimizer | {run.optimizer} |
| schedule | {run.schedule} |
| seed | {run.seed} |{added}
| base revision | {spec.model.revision} |
| dataset SHA-256 | {spec.dataset.sha256} |
{table}
## How to load it

{requirements(code)}

```python
{code}```

The tokenizer in this folder holds the chat template it was trained with.
"""


def _batch(run: RunSettings) -> str:
    one = f"{run.batch_size} rows" if run.batch_size else f"{run.max_tokens_per_step} tokens"
    return one if run.gradient_accumulation_steps == 1 else f"{run.gradient_accumulation_steps} × {one}"


def _folders(spec: JobSpec) -> list[tuple[Adapter, Path]]:
    return [(adapter, folder_of(adapter.path)) for adapter in spec.model.adapters]


def made_of(spec: JobSpec, labels: int) -> Provenance:
    """What the result of a job is put together from."""
    below = [AppliedAdapter(a.path, load_strategy(folder), (folder / NEW_TOKENS).is_file()) for a, folder in _folders(spec)]
    own = type(spec.strategy).adapter
    laid = (*below, AppliedAdapter(spec.name, spec.strategy, bool(spec.run.new_tokens))) if own else ()
    return Provenance(
        spec.model.name if own else None, laid, spec.model.shape.hidden, labels, spec.strategy if labels else None, spec.model.shape.encodes
    )
