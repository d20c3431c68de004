"""Finds the parts of a transformers model, with or without a language-model head. No torch needed."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, cast

from app.shapes import STRUCTURE, Shape, Structure

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel


def transformer(model: torch.nn.Module) -> PreTrainedModel:
    """The model typed as transformers' class; a peft wrapper forwards attribute access to it."""
    return cast("PreTrainedModel", model)


def wrapped(model: torch.nn.Module) -> PeftModel:
    """The model typed as peft's wrapper."""
    return cast("PeftModel", model)


def backbone(model: torch.nn.Module) -> torch.nn.Module:
    """The stack without its head: `model.model` of a causal LM, the model itself when it was loaded without a head."""
    return _headless(transformer(model).base_model)


def decoder(model: torch.nn.Module) -> PreTrainedModel:
    """The layers that write, without the head."""
    return _headless(transformer(model).get_decoder())


def _headless(found: Any) -> PreTrainedModel:
    """What transformers gives for a part; where that is the whole with its head, as of Llama4ForCausalLM, its `model`."""
    return cast("PreTrainedModel", found.model if hasattr(found, "lm_head") and hasattr(found, "model") else found)


def structure_of(model: torch.nn.Module) -> Structure | None:
    """What was found in a model whose architecture has no formulas in `app/shapes.py`."""
    kept = getattr(transformer(model).config, STRUCTURE, None)
    return Shape.model_validate(kept).structure if kept else None


def _inside(model: torch.nn.Module, name: str) -> torch.nn.Module:
    """A module by its name in the model with its head, in one that may have none."""
    body, own = backbone(model), name.removeprefix(f"{transformer(model).base_model_prefix}.")
    return body.get_submodule(own if hasattr(body, own.partition(".")[0]) else own.partition(".")[2])


def norms_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The norms of the blocks, and the one after them."""
    found = [module for block in blocks(model) for module in block.modules() if is_norm(module)]
    last = final_norm(model)
    return [*found, *([last] if last is not None else [])]


def is_norm(module: torch.nn.Module) -> bool:
    """Whether a module is a norm with weights of its own: every class of transformers and torch has the word in its name."""
    return "norm" in type(module).__name__.lower() and any(True for _ in module.parameters(recurse=False))


def blocks(model: torch.nn.Module) -> torch.nn.ModuleList:
    """The transformer blocks, first to last; of an encoder–decoder the encoder's first."""
    if found := structure_of(model):
        own = cast("torch.nn.ModuleList", _inside(model, found.stack))
        return cast("torch.nn.ModuleList", [*_inside(model, found.encoder_stack), *own]) if found.encoder_stack else own  # type: ignore[misc]
    body = backbone(model)
    return cast("torch.nn.ModuleList", body.get_submodule("layers" if hasattr(body, "layers") else "encoder.layer"))


def attention(block: torch.nn.Module) -> torch.nn.Module:
    """The module of a block that is called with `past_key_values`."""
    return block.get_submodule("self_attn" if hasattr(block, "self_attn") else "attention.self")


def attention_output(block: torch.nn.Module) -> torch.nn.Module:
    """The last linear layer of the attention sub-layer."""
    return block.get_submodule("self_attn.o_proj" if hasattr(block, "self_attn") else "attention.output.dense")


def feed_forward_output(block: torch.nn.Module) -> torch.nn.Module:
    """The last linear layer of the feed-forward sub-layer."""
    return block.get_submodule("mlp.down_proj" if hasattr(block, "mlp") else "output.dense")


def final_norm(model: torch.nn.Module) -> torch.nn.Module | None:
    """The norm after the last block; encoders have none."""
    if found := structure_of(model):
        return _inside(model, found.final_norm) if found.final_norm else None
    return getattr(backbone(model), "norm", None)


class LayerNotes:
    """Attributes that one layer of a model leaves for another during a pass."""

    positions: torch.Tensor
    output: torch.Tensor
    lengths: list[int] | None
    noted: list[int] | None


class NotesOfThreads(threading.local):
    """The same where several threads run through a model at once: each has its own. A copy starts empty."""

    positions: torch.Tensor
    output: torch.Tensor
    lengths: list[int] | None
    noted: list[int] | None

    def __reduce__(self) -> tuple[type[NotesOfThreads], tuple[Any, ...]]:
        return type(self), ()


def place_for_notes(device: torch.device) -> LayerNotes | NotesOfThreads:
    """On a GPU one thread at a time runs the model, but recomputation in the backward pass is on a thread of autograd's own."""
    return NotesOfThreads() if device.type == "cpu" else LayerNotes()


def draw_weights(model: torch.nn.Module, seed: int) -> None:
    """Draw every weight anew, as transformers initializes a model of this configuration; the same seed gives the same weights. The random
    state of the caller stays as it is."""
    import torch

    for part in (*model.modules(), *model.parameters(), *model.buffers()):
        part.__dict__["_is_hf_initialized"] = False  # transformers leaves alone what it has loaded
    at = next(model.parameters()).device
    with torch.random.fork_rng() if at.type == "cpu" else torch.random.fork_rng([at], device_type=at.type):
        torch.manual_seed(seed)
        transformer(model).initialize_weights()


def interpolate(base: dict[str, torch.nn.Parameter], tuned: torch.nn.Module, share: float) -> torch.nn.Module:
    """Interpolate every parameter of `tuned` that is not the base's own between the base's value (0) and its own (1). Rows of new tokens,
    which the base has not, stay as they are."""
    for name, weight in tuned.named_parameters():
        start = base.get(name)
        if start is None or start is weight:
            continue
        blended = weight.data.clone()
        own = blended[: start.shape[0]] if start.dim() else blended
        own.copy_(start.data.float() + share * (own.float() - start.data.float()))
        weight.data = blended
    return tuned


def parent_of(model: torch.nn.Module, name: str) -> tuple[torch.nn.Module, str]:
    """The module that has a parameter, and the parameter's name in it."""
    path, _, last = name.rpartition(".")
    return model.get_submodule(path), last
