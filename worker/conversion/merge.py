"""Merge a model's adapters into its base's weights: `python -m worker.conversion.merge REF.json INTO ANSWER`.

The merge is computed in float32, a layer at a time, and stored as float16, like the bases; the outputs of both forms are compared here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from app.errors import BadData, StudioError
from app.run_settings import RunSettings
from app.spec import ModelRef
from worker.runtime.fast_import import importing

with importing():
    import torch

    from worker.conversion.convert import inspect, must_fit, name_type
    from worker.conversion.layerwise import Scratch, compute_in_float32, lay, merge_adapter, stored_dtype
    from worker.data.batching import Row
    from worker.data.chat_template import render_prompt
    from worker.modeling import packed_attention, padded
    from worker.modeling.classifier import load_classifier, save_classifier
    from worker.modeling.loading import STRATEGY_FILE, folder_of, load_base, load_strategy, load_tokenizer
    from worker.runtime.device import choose
    from worker.training.objectives.classification import probabilities, tokenise_texts

TRIAL = "The cat sat on the mat, and then it went to sleep in the sun."
FARTHEST = 0.05
"""Maximum distance, in nats, between the next-token distributions of both forms on the trial text; more means that the merge is wrong."""


def main(arguments: list[str]) -> None:
    order, into, answer = (Path(a) for a in arguments)
    try:
        facts = merge(ModelRef.model_validate_json(order.read_text()), into)
    except StudioError as error:
        facts = {"error": error.message, "hint": error.hint}
    except Exception as error:  # whatever a library raises, a person must be able to read it
        facts = {"error": f"The model cannot be merged: {type(error).__name__}: {str(error)[:400]}", "hint": "Download the adapter."}
    answer.write_text(json.dumps(facts))


def merge(ref: ModelRef, into: Path) -> dict[str, Any]:
    """Write the merged model with its tokenizer into a new folder. Raises BadData when its outputs differ."""
    if ref.labels:
        return _merge_classifier(ref, into)
    tokenizer, scratch = load_tokenizer(ref), Scratch(into)
    ids = trial_ids(ref, tokenizer)
    model: torch.nn.Module = compute_in_float32(load_base(ref, stored_dtype(ref)))
    for adapter in ref.adapters[:-1]:
        model = merge_adapter(lay(model, adapter), ref, adapter, scratch.put)
    model = lay(model, ref.adapters[-1])
    expected = answers(model, ids)
    model = merge_adapter(model, ref, ref.adapters[-1], lambda weight: _rounded(weight, scratch))
    _round(model, scratch)
    apart = _apart(expected, answers(model, ids))
    _write(model, tokenizer, into)
    return {**inspect(into), "kind": ref.kind, "labels": None, "apart": apart}


def trial_ids(ref: ModelRef, tokenizer: Any) -> torch.Tensor:
    """The trial text (1, T); for an encoder–decoder it is the answer to itself."""
    if not ref.shape.encodes:
        return torch.as_tensor(tokenizer(TRIAL, return_tensors="pt").input_ids)
    _, prompt = render_prompt(tokenizer, ref.kind, [{"role": "user", "content": TRIAL}])
    return torch.tensor([[*prompt, *tokenizer(TRIAL, add_special_tokens=False).input_ids]])


def _merge_classifier(ref: ModelRef, into: Path) -> dict[str, Any]:
    """The same for a classifier: its backbone with everything merged, and its head and labels. Adapters below its own are merged in
    float32 when it is loaded, and then all of it is held so."""
    tokenizer, scratch, last = load_tokenizer(ref), Scratch(into), ref.adapters[-1]
    dtype = stored_dtype(ref) if len(ref.adapters) == 1 else torch.float32
    classifier, labels = load_classifier(
        ref, dtype, attention=packed_attention.NAME, lay=lambda model, adapter: lay(compute_in_float32(model), adapter)
    )
    strategy = load_strategy(folder_of(last.path))
    texts = tokenise_texts(tokenizer, [Row(1, {"text": TRIAL})], ref.shape.positions)
    engine = choose(RunSettings(precision="fp32"), strategy, {})
    expected = probabilities(classifier, texts, len(TRIAL), engine)
    classifier.backbone = merge_adapter(classifier.backbone, ref, last, lambda weight: _rounded(weight, scratch))
    _round(classifier.backbone, scratch)
    apart = _apart(*(torch.from_numpy(p).log() for p in (expected, probabilities(classifier, texts, len(TRIAL), engine))))
    _write(classifier.backbone, tokenizer, into)
    save_classifier(classifier, into, labels)
    (into / STRATEGY_FILE).write_text(strategy.model_dump_json(indent=1))  # the strategy that built the head
    return {"kind": ref.kind, "shape": ref.shape.model_dump(), "labels": labels, "apart": apart}


def _rounded(weight: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """A weight as it is stored, in float16. Raises Unsupported where it exceeds that."""
    must_fit([weight])
    return scratch.put(weight.to(torch.float16))


def _round(model: torch.nn.Module, scratch: Scratch) -> None:
    """Round every weight that no merge has rounded yet."""
    for parameter in model.parameters():
        if parameter.dtype != torch.float16:
            parameter.data = _rounded(parameter.data, scratch)


def _write(model: Any, tokenizer: Any, into: Path) -> None:
    model.save_pretrained(into)
    name_type(into, "bfloat16")
    tokenizer.save_pretrained(into)


def _apart(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Maximum absolute difference of two forms' log-probabilities (…, V), in nats. Raises BadData when it exceeds FARTHEST."""
    apart = (expected.exp() * (expected - found)).sum(-1).max().item()
    if not apart < FARTHEST:
        raise BadData(f"The merged model's answers differ from the adapter's by {apart:.3g} nats.", hint="Download the adapter instead.")
    return apart


def answers(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the next token at each position, (T, V)."""
    with torch.no_grad():
        logits = padded.whole_texts(model, ids.tolist())[0] if padded.encodes(model) else model(ids).logits[0]
        return logits.float().log_softmax(-1)


if __name__ == "__main__":
    main(sys.argv[1:])
