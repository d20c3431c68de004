"""The result of a job: a folder that the studio serves and that loads elsewhere with peft or transformers alone."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from app import manifest
from app.spec import JobSpec
from worker.checkpoint import State, Written, write_folder, write_weights

FINAL = "final"


def export(attempt: Path, spec: JobSpec, model: torch.nn.Module, tokenizer: Any, state: State) -> tuple[Written, str, str | None]:
    """Write `final/` in the attempt's folder. Returns it with its revision and, for an adapter, the SHA-256 of its weights
    (over the SHA-256 of each file, in the order of their names, where there are several)."""

    def fill(folder: Path) -> None:
        write_weights(folder, model, spec.strategy, tokenizer)
        (folder / "README.md").write_text(card(spec, state), encoding="utf-8")

    written = write_folder(attempt / FINAL, fill, step=state.step, base=spec.model.name, base_revision=spec.model.revision)
    made = manifest.read(written.path)
    assert made is not None
    weights = sorted(name for name in made["files"] if name.endswith(".safetensors"))
    digests = [made["files"][name]["sha256"] for name in weights]
    adapter = None
    if type(spec.strategy).adapter and digests:  # a classifier's head is a file of its own
        adapter = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    return written, made["revision"], adapter


def card(spec: JobSpec, state: State) -> str:
    """The model card: what it is, how it was made, how to load it."""
    strategy, run = spec.strategy, spec.run
    settings = "\n".join(f"| {key} | {value} |" for key, value in strategy.model_dump().items() if key != "name")
    scores = "".join(f"| {key} | {state.before[key]:.4f} | {state.best[key]:.4f} |\n" for key in state.before if key in state.best)
    table = f"\n## On held-out rows\n\n| | before | after |\n|---|---:|---:|\n{scores}" if scores else ""
    return f"""---
base_model: {spec.model.name}
library_name: {"peft" if type(strategy).adapter else "transformers"}
tags: [luthier, {strategy.name}]
---
# {spec.name}

{spec.model.name} tuned by {strategy.title} on the dataset “{spec.dataset.name}” ({spec.dataset.rows} rows) with Luthier.

## How it was made

| setting | value |
|---|---|
| strategy | {strategy.title} |
{settings}
| optimizer steps | {state.best_step or state.step} |
| tokens per step | {run.max_tokens_per_step} |
| learning rate | {run.learning_rate or type(strategy).default_learning_rate} |
| schedule | {run.schedule} |
| seed | {run.seed} |
| base revision | {spec.model.revision} |
| dataset SHA-256 | {spec.dataset.sha256} |
{table}
## How to load it

```python
{_loading(spec)}
```

The tokenizer in this folder holds the chat template it was trained with.
"""


def _loading(spec: JobSpec) -> str:
    if spec.task == "classification":
        return f"""# The probabilities of texts, from a studio that has this model:
# curl $LUTHIER/v1/classify -H "authorization: Bearer $LUTHIER_KEY" -H "content-type: application/json" \\
#   -d '{{"model": "…", "input": ["A text"]}}'
#
# In this folder: what {spec.strategy.title} changed in the stack, classifier_head.safetensors (the layers on the pooled
# states) and classifier.json (labels in the order of the scores, pooling, whether vectors are scaled to length 1)."""
    if not type(spec.strategy).adapter:
        return 'from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("this folder")'
    return (
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{spec.model.name}")\n'
        'model = PeftModel.from_pretrained(base, "this folder")'
    )
