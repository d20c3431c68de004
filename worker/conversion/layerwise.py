"""Merging with one layer in float32 at a time, so that a model of 2 bytes a weight is merged on a machine that could not hold 4.

The base's weights stay in their files, mapped into memory: the kernel reads them when they are used and drops them when memory is
short. A block, embedding or head has its weights in float32 only while it computes or is merged; a weight that a merge changed goes to a
scratch file and is mapped from there. So what is held is one block or one table, beside the adapter, and every sum is the one that a whole
model in float32 would compute.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from app.models.import_checks import check_safetensors
from app.models.integrity import BadModel
from app.spec import Adapter, ModelRef
from app.strategies._files import NEW_TOKENS, WEIGHTS
from app.strategies._model import blocks, transformer
from worker.modeling.loading import folder_of, lay_adapter, load_strategy

Keep = Callable[[torch.Tensor], torch.Tensor]
"""Takes a weight that a merge made, in float32, and returns what the model keeps of it."""

SMALL_BYTES = 2**20
"""A smaller weight stays in memory, since a file takes longer than it is worth."""
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}
_FLOATS = {*_DTYPES, "F32", "F64"}


def stored_dtype(ref: ModelRef) -> torch.dtype:
    """The dtype in which the base's weights are mapped without a copy: that of its files, or float32 where these have several."""
    headers = (check_safetensors(path) for path in folder_of(ref.path).glob("*.safetensors"))
    found = {kind for header in headers for kind, _ in header.values() if kind in _FLOATS}
    return _DTYPES.get(found.pop(), torch.float32) if len(found) == 1 else torch.float32


# Computing ------------------------------------------------------------------------------------------------------------


def compute_in_float32(model: torch.nn.Module) -> torch.nn.Module:
    """Have each block of a model without a strategy, and each module outside of them, compute in float32 whatever its weights are in.

    They are replaced for the time of a call, also those of an adapter's layers that are attached later. Called again it reaches modules
    that have come since, such as a head that peft put in the place of another.
    """
    inside: set[torch.nn.Module] = set()
    for block in blocks(model):
        _widen(block, whole=True)
        inside.update(block.modules())
    for module in model.modules():
        if module not in inside and module._parameters:
            _widen(module, whole=False)
    return model


def _widen(module: torch.nn.Module, *, whole: bool) -> None:
    if not any(isinstance(getattr(hook, "__self__", None), _Widened) for hook in module._forward_pre_hooks.values()):
        _Widened(module, whole=whole)


class _Widened:
    """Two hooks around a module's call; `whole` includes the modules in it."""

    def __init__(self, module: torch.nn.Module, *, whole: bool) -> None:
        self.whole = whole
        self.stored: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
        module.register_forward_pre_hook(self.before)
        module.register_forward_hook(self.after, always_call=True)

    def before(self, module: torch.nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        for weight in module.parameters(recurse=self.whole):
            if _is_narrow(weight):
                self.stored.append((weight, weight.data))
                weight.data = weight.data.float()
        # What was cast to the dtype of a weight that is stored in 16 bits.
        return tuple(x.float() if isinstance(x, torch.Tensor) and _is_narrow(x) else x for x in given)

    def after(self, *_: Any) -> None:
        for weight, stored in self.stored:
            weight.data = stored
        self.stored.clear()


def _is_narrow(tensor: torch.Tensor) -> bool:
    return tensor.dtype in (torch.float16, torch.bfloat16)


# Merging --------------------------------------------------------------------------------------------------------------


def lay(model: torch.nn.Module, adapter: Adapter) -> torch.nn.Module:
    """As `lay_adapter`, and exact next to weights of 16 bits: those whose place the adapter's own take are in float32 first."""
    with torch.no_grad():
        for weight in _replaced(model, folder_of(adapter.path)):
            weight.data = weight.data.float()
    return lay_adapter(model, adapter).eval()


def _replaced(model: torch.nn.Module, folder: Path) -> Iterator[torch.nn.Parameter]:
    """The weights that an adapter may have a value of its own for: those it names, the tables where it has new tokens, and every vector,
    since peft writes biases under other names."""
    names = check_safetensors(folder / WEIGHTS).keys() if (folder / WEIGHTS).is_file() else ()
    own = {name.removeprefix("base_model.model.") for name in names}
    yield from (weight for name, weight in model.named_parameters(remove_duplicate=False) if name in own or weight.dim() < 2)
    if (folder / NEW_TOKENS).is_file():
        for table in (transformer(model).get_input_embeddings(), transformer(model).get_output_embeddings()):
            yield from table.parameters() if table is not None else ()


def merge_adapter(model: torch.nn.Module, ref: ModelRef, adapter: Adapter, keep: Keep) -> torch.nn.Module:
    """A model with one adapter attached by `lay`, with that merged into its weights, layer by layer. Raises BadModel when it cannot be."""
    strategy = load_strategy(folder_of(adapter.path))
    if not strategy.merges:
        raise BadModel(f"{ref.name} was made by {strategy.title}, which cannot be merged.", hint="Download the adapter.")
    with warnings.catch_warnings(), torch.no_grad():
        for layer in [module for module in model.modules() if isinstance(module, BaseTunerLayer)]:
            _merge_layer(layer, keep)
        warnings.filterwarnings("ignore", message="All adapters are already merged")
        return compute_in_float32(strategy.merge(model)).eval()


def _merge_layer(layer: Any, keep: Keep) -> None:
    for weight in layer.get_base_layer().parameters():
        weight.data = weight.data.to(torch.float32, copy=True)  # peft adds in place, and a mapped file stays as it is
    layer.merge()
    for weight in layer.get_base_layer().parameters():
        weight.data = keep(weight.data)


class Scratch:
    """Tensors in files of a folder, each of which loses its name once it is mapped, so that its room is free with its last tensor."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same values mapped from a file; a small tensor as it is. Raises OSError when the disk is full."""
        if tensor.nbytes < SMALL_BYTES:
            return tensor
        handle, path = tempfile.mkstemp(dir=self.folder, prefix=".weight-")
        try:
            with os.fdopen(handle, "wb") as file:
                tensor.contiguous().numpy().tofile(file)
            return torch.from_file(path, shared=True, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
        finally:
            os.unlink(path)
