"""Convert a GGUF file or a transformers folder into the folder Luthier keeps: `python -m worker.conversion.convert FROM INTO
ANSWER [KIND]`. Or check a kept folder again, by the current rules: `python -m worker.conversion.convert --examine FOLDER ANSWER`.

Runs as a child process with limits, because it opens untrusted files: tokenizers, chat templates, quantized weights. It writes
its result to the file ANSWER as JSON: kind, shape, parameters, chat_template, max_length; or error and hint.

A GGUF's weights are dequantized once and stored as float16, without a measurable loss (mean divergence of the next token 3e-6
nats for SmolLM2 and 1e-6 for Gemma, the same top token everywhere; bfloat16 gave 6e-5 and another top token once in a hundred).
The config says bfloat16 all the same, the dtype both were published in: computing in 16 bits must use that, because Gemma's
activations overflow float16.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from app.errors import BadData, StudioError, Unsupported
from app.models import gguf_header, import_checks, model_json, quantized
from app.shapes import Shape
from worker.conversion import rotary, trial
from worker.runtime.fast_import import importing
from worker.runtime.limited_fork import limited

if TYPE_CHECKING:
    import torch

SECONDS, FILE_BYTES = 1800, 64 * 2**30  # CPU seconds, and the largest file it may write
TRIAL_SECONDS, TRIAL_BYTES = 60, 2 * 2**30  # CPU seconds and memory of the fork that opens tokenizer and template


def main(arguments: list[str]) -> None:
    source, into, answer = (Path(a) for a in arguments[:3])
    kind = arguments[3] if len(arguments) > 3 else None
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def work() -> dict[str, Any]:
        if arguments[0] == "--examine":
            return examine(into)
        facts = from_gguf(source, into) if source.is_file() else from_folder(source, into)
        # An encoder–decoder is asked by its template, whatever it is called.
        return facts if Shape.model_validate(facts["shape"]).encodes else {**facts, "kind": kind or facts["kind"]}

    write_answer(answer, work)


def write_answer(answer: Path, work: Callable[[], dict[str, Any]]) -> None:
    """Write what `work` returns to a file as JSON; or, whatever it raises, an error that a person can read."""
    try:
        facts = work()
    except StudioError as error:
        facts = {"error": error.message, "hint": error.hint, "code": error.code}
    except MemoryError:
        facts = {"error": "The machine has too little memory for this model.", "hint": "Choose a smaller model."}
    except Exception as error:
        facts = {"error": f"The model cannot be read: {type(error).__name__}: {str(error)[:400]}", "hint": "Save it again and retry."}
    answer.write_text(json.dumps(facts))


# GGUF ---------------------------------------------------------------------------------------------------------------


def from_gguf(source: Path, into: Path) -> dict[str, Any]:
    """Dequantize, save as float16 safetensors with its tokenizer, read it back and compare."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    keys = gguf_header.check_gguf(source)
    place: dict[str, Any] = {"gguf_file": source.name, "local_files_only": True}
    config = AutoConfig.from_pretrained(source.parent, **place)
    mend_config(config, source, keys)
    model = AutoModelForCausalLM.from_pretrained(source.parent, config=config, dtype=torch.float32, **place)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, **place)
    mend_tokenizer(tokenizer, keys, model.config.max_position_embeddings)
    make_plain(model)
    ids = tokenizer("The cat sat on the mat, and then it went to sleep in the sun.", return_tensors="pt").input_ids
    must_fit(model.parameters())
    for parameter in model.parameters():  # parameters only: the frequencies of the rotary embedding, a buffer, stay exact
        parameter.data = parameter.data.to(torch.float16)
    model.save_pretrained(into)
    name_type(into, "bfloat16")
    tokenizer.save_pretrained(into)
    with torch.no_grad():
        expected = model.float().eval()(ids).logits
    facts = inspect(into)
    again = AutoModelForCausalLM.from_pretrained(into, dtype=torch.float32, local_files_only=True).eval()
    with torch.no_grad():
        if not torch.equal(again(ids).logits, expected):
            raise BadData("The converted weights do not give the answers of those they came from.", hint="Try again.")
    return facts


def must_fit(weights: Iterable[torch.Tensor]) -> None:
    """Raises Unsupported when a weight exceeds the range of float16."""
    largest = max(weight.abs().max().item() for weight in weights)
    if not largest < 65_504:
        raise Unsupported(f"A weight of {largest:g} does not fit into 16 bits.", hint="Use the model's safetensors version.")


def name_type(folder: Path, dtype: str) -> None:
    """Write the dtype that a loader uses by default into the config."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": dtype}, indent=2, sort_keys=True) + "\n")


def make_plain(model: Any) -> None:
    """Remove the quantization marks: the weights are not quantized any more, and transformers refuses to save a model with them."""
    model.hf_quantizer = None
    model.is_quantized = False
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        model.config.__dict__.pop(name, None)
    if getattr(model, "quantization_method", None) is not None:
        del model.quantization_method


def mend_config(config: Any, source: Path, keys: dict[str, Any]) -> None:
    """Restore what transformers' GGUF reader drops from a config: the width of a head where it is no share of the hidden size, the
    scale of Gemma's queries, and the stretched rotary frequencies of Llama 3.1 and later. Raises Unsupported for a rotary embedding that would be read as a plain one.
    """
    import gguf

    width = keys.get(f"{keys.get('general.architecture')}.attention.key_length")
    if width and getattr(config, "head_dim", width) != width:
        config.head_dim = width
    if config.model_type == "gemma3_text":  # llama.cpp knows the 27B, whose queries are scaled by another width, by its 62 layers
        config.query_pre_attn_scalar = (
            config.hidden_size // config.num_attention_heads if config.num_hidden_layers == 62 else config.head_dim
        )
    scaling = keys.get(f"{keys.get('general.architecture')}.rope.scaling.type", "none")
    factors = [np.array(one.data, np.float32) for one in gguf.GGUFReader(source).tensors if one.name == "rope_freqs.weight"]
    found = rotary.llama3_of(factors[0], config.to_dict()) if factors else None
    if found:
        config.rope_parameters = found
    elif factors or scaling != "none":
        raise Unsupported(
            f"Its rotary embedding ({scaling if scaling != 'none' else 'factors per frequency'}) is not read from GGUF files.",
            hint="Import the model's safetensors version.",
        )


def mend_tokenizer(tokenizer: Any, keys: dict[str, Any], positions: int) -> None:
    """Restore tokenizer settings that transformers' GGUF reader drops.

    A byte-level tokenizer with the pre-tokenizer "smollm" splits numbers into digits before anything else; without that, two
    spaces before a number become other tokens than the model was trained on. The maximum length is set too.
    """
    from tokenizers import pre_tokenizers

    if keys.get("tokenizer.ggml.pre") in ("smollm", "starcoder"):
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
        )
    tokenizer.model_max_length = positions
    tokenizer.padding_side = "right"


# Folders ------------------------------------------------------------------------------------------------------------


def from_folder(source: Path, into: Path) -> dict[str, Any]:
    """Copy the allowed files, weights of 8 bits as bf16, and check what a library will open later. The copy is checked, because nobody
    else can change it; its JSON files are rewritten from the checked contents, without unknown keys."""
    _, files = import_checks.check_head(source)
    config = model_json.read(source, "config.json")
    scheme = quantized.scheme_of(config["quantization_config"]) if "quantization_config" in config else None
    weights = [path for path in files if path.suffix == ".safetensors"] if scheme else []
    for path in files:
        if path in weights or (scheme and path.name == "model.safetensors.index.json"):
            continue
        target = into / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    if scheme is None:
        return inspect(into, rewrite=True)
    from worker.conversion import dequantize

    dequantize.write_weights(weights, into, scheme)
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "torch_dtype")}
    (into / "config.json").write_text(json.dumps({**plain, "dtype": "bfloat16"}))
    return {**inspect(into, rewrite=True), "dequantized": scheme.title}


def inspect(folder: Path, *, rewrite: bool = False) -> dict[str, Any]:
    """Check the folder's files, try its tokenizer and template, build the model without weights, and compare it with the shape
    arithmetic and the weights."""
    found = examine(folder, rewrite=rewrite)
    written, shape = json.loads((folder / "config.json").read_text()), Shape.model_validate(found["shape"])
    import torch
    from transformers import AutoConfig

    from worker.modeling.auto import maker_of

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model = maker_of(shape).from_config(config)
    if shape.architecture == "decoder":
        model.tie_weights()
    counted = sum(p.numel() for p in model.parameters())
    if counted != shape.parameters():  # of a shape with formulas; any other was counted the same way
        raise Unsupported(
            f"This {shape.model_type} has {counted:,} parameters where {shape.parameters():,} were expected, "
            "so what it costs to fine-tune could not be predicted.",
            hint="Its architecture differs from the usual one and is not supported.",
        )
    if shape.structure is None:
        check_names(folder, model, shape)
    template = found["chat_template"]
    return {
        "kind": "encoder" if shape.architecture == "encoder" else "instruction" if shape.encodes else "dialogue" if template else "generic",
        "shape": found["shape"],
        "parameters": counted,
        "chat_template": template,
        "labels": labels_of(written),
        "rules": import_checks.RULES,
    }


def examine(folder: Path, *, rewrite: bool = False) -> dict[str, Any]:
    """`{"shape", "chat_template"}` of a folder whose files pass the checks and whose tokenizer and template were tried, all in a
    fork with limits. With `rewrite` its JSON files are rewritten in the form in which they are kept. Raises BadData."""
    with importing():  # transformers imports most of itself on the first use of a config, a model and a tokenizer
        import torch  # noqa: F401
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

    return limited(lambda: trial.look_at(folder, rewrite), "Reading the model's tokenizer and template", TRIAL_SECONDS, TRIAL_BYTES)


def check_names(folder: Path, model: Any, shape: Shape) -> None:
    """Check that the files hold every weight of the model, so that none is initialized randomly when it is loaded."""
    found: set[str] = set()
    for path in folder.glob("*.safetensors"):
        found |= import_checks.check_safetensors(path).keys()
    bare = {name.removeprefix(f"{model.base_model_prefix}.") for name in found}
    old = {name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias") for name in bare}
    needed = {name.removeprefix(f"{model.base_model_prefix}.") for name, _ in model.named_parameters()}
    missing = sorted(n for n in needed - old if not (shape.tied and n == "lm_head.weight") and not n.startswith("pooler."))
    if missing:
        raise BadData(f"The weights lack {len(missing)} of the model's tensors, the first {missing[0][:80]}.", hint="Copy the whole model.")


def labels_of(config: dict[str, Any]) -> list[str] | None:
    """Class names of a sequence classifier, in order; None for any other model."""
    if not any("SequenceClassification" in str(name) for name in config.get("architectures") or []):
        return None
    names = config.get("id2label") or {}
    return [str(names[key]) for key in sorted(names, key=int)] or None


if __name__ == "__main__":
    os.nice(5)
    main(sys.argv[1:])
