"""Finding one's way in a transformers model, whether it carries a language-modelling head or not. No torch needed."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel


def transformer(model: torch.nn.Module) -> PreTrainedModel:
    """The same model as transformers makes it. One that peft has wrapped hands on what it is asked."""
    return cast("PreTrainedModel", model)


def wrapped(model: torch.nn.Module) -> PeftModel:
    """The same model as peft has wrapped it."""
    return cast("PeftModel", model)


def backbone(model: torch.nn.Module) -> torch.nn.Module:
    """The stack without its head: `model.model` of a causal LM, the model itself when it was loaded without a head."""
    return transformer(model).base_model


def blocks(model: torch.nn.Module) -> torch.nn.ModuleList:
    """The transformer blocks, first to last."""
    body = backbone(model)
    return cast("torch.nn.ModuleList", body.get_submodule("layers" if hasattr(body, "layers") else "encoder.layer"))


def attention(block: torch.nn.Module) -> torch.nn.Module:
    """The module of a block that is called with `past_key_values`."""
    return block.get_submodule("self_attn" if hasattr(block, "self_attn") else "attention.self")


def attention_output(block: torch.nn.Module) -> torch.nn.Module:
    """The linear layer that ends the attention sub-layer."""
    return block.get_submodule("self_attn.o_proj" if hasattr(block, "self_attn") else "attention.output.dense")


def feed_forward_output(block: torch.nn.Module) -> torch.nn.Module:
    """The linear layer that ends the feed-forward sub-layer."""
    return block.get_submodule("mlp.down_proj" if hasattr(block, "mlp") else "output.dense")


def final_norm(model: torch.nn.Module) -> torch.nn.Module | None:
    """The norm after the last block; encoders have none."""
    return getattr(backbone(model), "norm", None)


class Notes:
    """Attributes that one layer of a model leaves for another during a pass."""

    positions: torch.Tensor
    output: torch.Tensor


class NotesOfThreads(threading.local):
    """The same where several threads pass through a model at once: each has its own. A copy begins empty."""

    positions: torch.Tensor
    output: torch.Tensor

    def __reduce__(self) -> tuple[type[NotesOfThreads], tuple[Any, ...]]:
        return type(self), ()


def place_for_notes(device: torch.device) -> Notes | NotesOfThreads:
    """On a GPU one thread passes through a model at a time, but what is computed anew on the way back is so in a thread of autograd's own."""
    return NotesOfThreads() if device.type == "cpu" else Notes()


def interpolate(base: dict[str, torch.nn.Parameter], tuned: torch.nn.Module, share: float) -> torch.nn.Module:
    """Every parameter of `tuned` that is not the base's own, moved to a place between the base's (0) and its own (1)."""
    for name, weight in tuned.named_parameters():
        start = base.get(name)
        if start is not None and start is not weight:
            weight.data = (start.data.float() + share * (weight.data.float() - start.data.float())).to(weight.dtype)
    return tuned


def parent_of(model: torch.nn.Module, name: str) -> tuple[torch.nn.Module, str]:
    """The module that holds a parameter, and the parameter's name in it."""
    path, _, last = name.rpartition(".")
    return model.get_submodule(path), last
