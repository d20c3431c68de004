"""Reads the shape of a model whose architecture has no formulas in `app/shapes.py` from the model itself, built without weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import torch
from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from transformers.pytorch_utils import Conv1D

from app.errors import Unsupported
from app.shapes import Block, Linear, Shape, Structure
from app.strategies._model import decoder, is_norm
from worker.modeling.auto import width_of

_EXPERTS = "experts"


def shape_of_model(model: Any, architecture: Literal["decoder", "encoder"] = "decoder") -> Shape:
    """The shape of a language model, or of an encoder without a head, on the meta device. Raises Unsupported where it has no list of
    layers as long as its config says, no embedding of tokens, no output layer over its vocabulary, or a value that no config leaves
    out."""
    config = model.config.get_text_config()
    encoder_stack, encoder_layers = _lists_of(model, model.get_encoder(), "the encoder") if config.is_encoder_decoder else ("", ())
    stack, own = _lists_of(model, decoder(model), "the decoder") if config.is_encoder_decoder else _stack(model, config)
    layers = [*encoder_layers, *own]
    embedding, head = model.get_input_embeddings(), _head(model, architecture)
    if embedding is None or (architecture == "decoder" and getattr(head, "weight", None) is None):
        raise _strange(config, "no embedding of tokens and output layer over them")
    kinds, order = _kinds(layers, _expert_share(config), _left_out(model))
    inside = {id(weight) for block in layers for weight in block.parameters()}
    tied = architecture == "decoder" and head.weight is embedding.weight
    last = _final_norm(model, stack, inside)
    own_head = 0 if tied or head is None else sum(weight.numel() for weight in head.parameters())
    every = {id(weight): weight.numel() for weight in model.parameters()}
    norm_parameters = sum(weight.numel() for weight in last[1].parameters()) if last else 0
    outside = sum(count for key, count in every.items() if key not in inside)
    width = int(config.hidden_size)
    heads = width_of(config, "num_attention_heads") or 1
    structure = Structure(
        kinds=tuple(kinds),
        order=tuple(order),
        stack=stack,
        final_norm=last[0] if last else "",
        final_norm_parameters=norm_parameters,
        embedding=outside - own_head - norm_parameters,
        head=own_head,
        parameters=sum(every.values()),
        encoder_stack=encoder_stack,
        encoder_layers=len(encoder_layers),
    )
    wide = [linear.outputs for kind in kinds for linear in kind.linears]
    return Shape(
        model_type=config.model_type,
        architecture=architecture,
        layers=len(layers),
        hidden=width,
        intermediate=width_of(config, "intermediate_size") or max(wide, default=width),
        heads=heads,
        kv_heads=width_of(config, "num_key_value_heads") or (1 if getattr(config, "multi_query", False) else heads),
        head_dim=width_of(config, "head_dim") or width // heads,
        vocabulary=int(embedding.weight.shape[0]),
        positions=(width_of(config, "max_position_embeddings") or 2048) - _reserved_positions(model),
        tied=tied,
        gated=any("gate" in linear.name for kind in kinds for linear in kind.linears),
        sliding_window=width_of(config, "sliding_window"),
        structure=structure,
    )


def _lists_of(model: Any, part: Any, which: str) -> tuple[str, torch.nn.ModuleList]:
    """The list of modules in a part of a model that holds most parameters, with its name in the model."""
    inside = {id(module) for module in part.modules()}
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList) and id(module) in inside]
    if not found:
        raise _strange(model.config, f"no list of layers in {which}")
    return max(found, key=lambda pair: sum(weight.numel() for weight in pair[1].parameters()))


def _head(model: Any, architecture: str) -> Any:
    """The output layer of a decoder; the pooler of an encoder, which classifiers here do without, where it has one."""
    return getattr(model, "pooler", None) if architecture == "encoder" else model.get_output_embeddings()


def _reserved_positions(model: Any) -> int:
    """Rows of its table of positions that no text uses: RoBERTa and its relatives count from the padding index + 1."""
    counted = (module for module in model.modules() if hasattr(module, "create_position_ids_from_input_ids"))
    return next((module.padding_idx + 1 for module in counted if isinstance(getattr(module, "padding_idx", None), int)), 0)


def _strange(config: Any, what: str) -> Unsupported:
    return Unsupported(
        f"The architecture {config.model_type} has {what}, so it cannot be fine-tuned here.", hint="Choose another model.", param="path"
    )


def _stack(model: Any, config: Any) -> tuple[str, torch.nn.ModuleList]:
    """The list of layers, with its name: of those as long as the config says the one that holds most parameters."""
    count = int(config.num_hidden_layers)
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList) and len(module) == count]
    if not found:
        raise _strange(config, f"no list of {count} layers")
    return max(found, key=lambda pair: sum(weight.numel() for weight in pair[1].parameters()))


_FUSED_TYPES = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})
_FUSED = frozenset({"out_proj", "conv1d"})
"""Layers of these architectures whose weights a kernel reads past the layer, so that peft puts no LoRA next to them."""


def _left_out(model: Any) -> frozenset[str]:
    """Last names of the layers that no adapter can be put next to: those of `_FUSED`, and those of which peft takes the names to mean
    the experts of an earlier transformers, so that for the dense layer of that name it would train the experts instead."""
    fused = _FUSED if model.config.model_type in _FUSED_TYPES else frozenset()
    names = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}  # whole, since some are refused alone
    asked = LoraConfig(target_modules=sorted(names))
    convert_peft_config_for_transformers(asked, model, None)
    return fused | (names - set(asked.target_modules or ()))


def _kinds(layers: Sequence[torch.nn.Module], share: float, left_out: frozenset[str]) -> tuple[list[Block], list[int]]:
    kinds: list[Block] = []
    order: list[int] = []
    for block in layers:
        found = _block(block, share, left_out)
        if found not in kinds:
            kinds.append(found)
        order.append(kinds.index(found))
    return kinds, order


def _answers_as_linear(module: torch.nn.Linear) -> bool:
    """Whether a linear layer, perhaps with a forward of its own, gives one tensor of its width: a router may answer with more, and one of
    groups reads another shape."""
    if type(module).forward is torch.nn.Linear.forward:
        return True
    try:
        with torch.no_grad():
            out: Any = module(module.weight.new_zeros(1, module.in_features))
    except Exception:
        return False
    return isinstance(out, torch.Tensor) and out.shape == (1, module.out_features)


def _block(block: torch.nn.Module, share: float, left_out: frozenset[str]) -> Block:
    linears: list[Linear] = []
    norms = biases = experts = 0
    for name, module in block.named_modules():
        own = Counter({key: weight.numel() for key, weight in module.named_parameters(recurse=False)})
        biases += sum(count for key, count in own.items() if key.endswith("bias"))
        if is_norm(module):
            norms += own.total()
        elif name.rpartition(".")[2] in left_out:
            continue
        elif isinstance(module, Conv1D):
            linears.append(Linear(name, module.weight.shape[0], module.weight.shape[1], True))
        elif isinstance(module, torch.nn.Linear) and _answers_as_linear(module):
            linears.append(Linear(name, module.in_features, module.out_features, module.bias is not None))
        elif name.split(".")[-1] == _EXPERTS:
            experts += sum(weight.numel() for weight in module.parameters(recurse=False) if weight.dim() == 3)
    return Block(
        linears=tuple(linears),
        parameters=sum(weight.numel() for weight in block.parameters()),
        norms=norms,
        biases=biases,
        experts=experts,
        expert_share=share if experts else 1.0,
    )


def _expert_share(config: Any) -> float:
    """Of its routed experts, the share that a token passes."""
    every = next(
        (n for name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts") if (n := width_of(config, name))), None
    )
    some = next((n for name in ("num_experts_per_tok", "moe_topk", "moe_k") if (n := width_of(config, name))), None)
    return min(1.0, some / every) if every and some else 1.0


def _final_norm(model: Any, stack: str, inside: set[int]) -> tuple[str, torch.nn.Module] | None:
    """The norm after the layers: the last one that is next to their list, and not of something else that stands there."""
    place = stack.rpartition(".")[0]
    found = [
        (f"{place}.{name}".strip("."), module)
        for name, module in model.get_submodule(place).named_children()
        if is_norm(module) and not any(id(weight) in inside for weight in module.parameters())
    ]
    named = [pair for pair in found if not any(word in pair[0].rsplit(".", 1)[-1] for word in ("emb", "input", "first", "per_layer"))]
    return named[-1] if named else None
