"""Loads models and tokenizers from folders of the data folder: safetensors only, no remote code, no network."""

from __future__ import annotations

import json
import sys
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from transformers import AutoTokenizer, PreTrainedModel

from app.errors import DoesNotFit
from app.models import integrity
from app.models.integrity import BadModel
from app.settings import get_settings
from app.spec import Adapter, ModelRef
from app.strategies import AnyStrategy, Strategy
from app.strategies._model import structure_of
from worker.modeling import new_tokens, padded
from worker.modeling import packed_attention as packed
from worker.modeling.auto import maker_of
from worker.runtime import devices

devices.set_up()

if not devices.gpu():
    # peft imports bitsandbytes wherever it finds it, which costs every process more than a second of CPU time, and nothing here
    # uses it without a GPU. None in its place makes it look not installed.
    sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]

LOADING = threading.RLock()
"""Held while weights are loaded by a process that loads from several threads: transformers builds a model under process-wide
settings, so two at once can leave tensors uninitialized."""

STRATEGY_FILE = "strategy.json"
"""The strategy's settings, saved with its weights, so that a folder is enough to attach it to its base."""


def folder_of(path: str) -> Path:
    """A folder named by a path relative to the data folder. Raises BadModel when it does not exist, or when a file differs from
    its manifest."""
    integrity.check(path, "the model", may_be_plain=True)
    return get_settings().data_dir / path


def load_tokenizer(ref: ModelRef) -> Any:
    """The tokenizer of a model; an adapter that has its own (with its chat template) is served with that one."""
    own = [a.path for a in ref.adapters if (folder_of(a.path) / "tokenizer_config.json").is_file()]
    folder = folder_of(own[-1] if own else ref.path)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many types, and they mean the same to a person
        raise BadModel(f"The tokenizer of {ref.name} cannot be read: {error}", hint="Add the model again.") from error


def own_attention(ref: ModelRef, attention: str) -> str | None:
    """The attention that a model is loaded with: where packs failed when it was added its own, since another gives it no mask."""
    structure = ref.shape.structure
    return attention if structure is None or structure.packs else None


def load_base(
    ref: ModelRef, dtype: torch.dtype = torch.float32, attention: str = "sdpa", device: str = "cpu", bits: int | None = None
) -> PreTrainedModel:
    """The weights in `ref.path` without adapters, in `dtype` (or in 4 or 8 `bits`), on `device`, in evaluation mode."""
    try:
        model = maker_of(ref.shape).from_pretrained(
            folder_of(ref.path),
            dtype=dtype,
            attn_implementation=own_attention(ref, attention),
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            **(straight_to(device) if bits is None else _in_bits(bits, dtype, device)),
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise BadModel(f"{ref.name} cannot be loaded: {error}", hint="Add the model again, or choose another.") from error
    return made_ready(model, ref, attention, device)


def made_ready(model: PreTrainedModel, ref: ModelRef, attention: str, device: str) -> PreTrainedModel:
    """A loaded model in evaluation mode on its device, set up for packed rows where `attention` asks for them.

    Raises BadModel when packing would let its sequences see each other.
    """
    if attention == packed.NAME:
        if ref.shape.structure and not ref.shape.structure.packs:
            padded.pad_packs(model)
        elif not structure_of(model) and not packed.packs(model):  # one with a structure was tried when it was added
            raise BadModel(
                f"{ref.name} ({ref.shape.model_type}) mixes neighbouring texts by means of its own, so rows cannot be packed for it.",
                hint="Choose a model whose layers read by attention alone, such as Llama, Qwen, Gemma, BERT or RoBERTa.",
            )
        packed.count_from_padding(model)
    if model.dtype == torch.float16:
        # In some models the residual stream exceeds the range of fp16, while the norms' outputs, which the products read, do not. It is
        # float32 from the embedding on, because each block adds to its input.
        model.get_input_embeddings().register_forward_hook(lambda _, given, out: out.float())
    # Saved configs then name the model, not a folder of this machine.
    model.name_or_path = model.config._name_or_path = ref.name
    return (model if getattr(model, "is_quantized", False) else model.to(device)).eval()  # type: ignore[arg-type]  # its decorator hides `self`


def straight_to(device: str) -> dict[str, Any]:
    """Arguments that load each tensor straight to a GPU. Without them the whole model stands in RAM in its dtype first, where that is not
    the dtype of its files."""
    return {} if device == "cpu" else {"device_map": {"": device}}


def _in_bits(bits: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Arguments that load a base in 4 or 8 bits: NF4 with double quantization (Dettmers et al. 2023, QLoRA,
    https://arxiv.org/abs/2305.14314, section 3)."""
    if find_spec("bitsandbytes") is None:
        raise DoesNotFit(
            f"A base in {bits} bits needs the package bitsandbytes, which is not installed with this worker's torch.",
            hint="Install the extra `gpu` again (`luthier doctor` shows what is missing), or choose lora.",
            param="strategy",
        )
    from transformers import BitsAndBytesConfig

    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    return {"quantization_config": BitsAndBytesConfig(**(four if bits == 4 else {"load_in_8bit": True})), "device_map": {"": device}}


def load_strategy(folder: Path) -> Strategy:
    """The strategy whose settings a result folder holds."""
    settings = json.loads((folder / STRATEGY_FILE).read_text())
    return TypeAdapter(AnyStrategy).validate_python(settings)


def lay_adapter(model: torch.nn.Module, adapter: Adapter) -> torch.nn.Module:
    """Attach one adapter to a model, scaled by the adapter's blend; new tokens have the rows that they learned."""
    folder = folder_of(adapter.path)
    try:
        new_tokens.load(model, folder)
        strategy = load_strategy(folder)
        return strategy.load(model, folder) if adapter.blend == 1 else strategy.load_blended(model, folder, adapter.blend)
    except (OSError, ValueError, KeyError) as error:
        raise BadModel(
            f"The adapter in {adapter.path} cannot be loaded: {error}", hint="Fine-tune again, or choose another model."
        ) from error


def load_model(ref: ModelRef, dtype: torch.dtype = torch.float32, attention: str = "sdpa", device: str = "cpu") -> torch.nn.Module:
    """The whole model: the base with its adapters attached in order. All but the last are merged."""
    model: torch.nn.Module = load_base(ref, dtype, attention, device)
    for position, adapter in enumerate(ref.adapters):
        model = lay_adapter(model, adapter)
        if position < len(ref.adapters) - 1:
            model = load_strategy(folder_of(adapter.path)).merge(model)
    return model.to(device).eval()


def load_plain(
    ref: ModelRef, dtype: torch.dtype = torch.float32, attention: str = "sdpa", device: str = "cpu", bits: int | None = None
) -> torch.nn.Module:
    """The whole model with every adapter merged into its weights, the start of another fine-tuning.

    Raises BadModel when one of them cannot be merged.
    """
    model: torch.nn.Module = load_base(ref, dtype, attention, device, bits)
    for adapter in ref.adapters:
        strategy = load_strategy(folder_of(adapter.path))
        if not strategy.merges:
            raise BadModel(
                f"{ref.name} was made by {strategy.title}, which cannot be merged, so it cannot be fine-tuned further.",
                hint="Fine-tune the model it came from instead.",
            )
        model = strategy.merge(lay_adapter(model, adapter))
    return model.eval()
